"""A published recipe with another loss: `segcore train examples/losses.py:cross_entropy_and_dice`.

The same on the command line: `--loss.kind cross_entropy dice --loss.weights 1 0.5 --loss.label-smoothing 0.1`.
"""

from dataclasses import replace

from segcore import Experiment, load_experiment


def cross_entropy_and_dice() -> Experiment:
    """Both of DDRNet's heads train on cross entropy with smoothed labels plus half the Dice loss.

    The recipe's class weights stay; `LossConfig(...)` in place of `replace` starts from the defaults.
    """
    published = load_experiment("ddrnet_23_slim_cityscapes")
    loss = replace(published.loss, kind=("cross_entropy", "dice"), weights=(1.0, 0.5), label_smoothing=0.1)
    return replace(published, name="cross_entropy_and_dice", loss=loss)
