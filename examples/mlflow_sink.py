"""Follow a run in MLflow: copy this file beside yours, `pip install mlflow`, and name it.

    segcore train CONFIG --train.log mlflow_sink.py:Sink

MLFLOW_TRACKING_URI names the server; without it MLflow writes to the current folder. A resumed run continues in the
same MLflow run, whose id is kept in the run's folder.
"""

import mlflow
from PIL import Image


class Sink:
    """What `train.log` names: made once, on rank 0, with the `Run` that it is for."""

    def __init__(self, run):
        self.work_dir, file = run.work_dir, run.work_dir / "mlflow_run_id.txt"
        mlflow.set_experiment("segcore")
        mlflow.start_run(run_id=file.read_text() if file.is_file() else None, run_name=run.work_dir.name)
        file.write_text(mlflow.active_run().info.run_id)
        if run.start == 0:  # MLflow lets no parameter change
            mlflow.log_params({name: str(value)[:500] for name, value in run.changed.items()})
        mlflow.log_dict(run.settings, "settings.json")

    def log(self, iteration, values):
        # MLflow takes `val_iou/traffic light`, but not `val_iou/a+b`.
        known = {"".join(c if c.isalnum() or c in "/._- " else "_" for c in name): x for name, x in values.items()}
        mlflow.log_metrics(known, step=iteration)

    def image(self, iteration, image):
        mlflow.log_image(Image.fromarray(image), f"predictions_{iteration}.png")

    def finish(self, results):
        if results is not None:
            mlflow.log_dict(results, "results.json")
        mlflow.end_run("FAILED" if results is None else "FINISHED")
