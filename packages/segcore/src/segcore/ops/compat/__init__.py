"""The interfaces under which other projects import these operators; each module is named after one of them.

`deformable_detr`, `mmcv` and `torchvision` have the names, arguments, parameters and state-dict keys of the originals,
and import nothing besides torch. Every operator accepts any batch size, so that `im2col_step` is accepted and unused,
and is differentiable once. Whatever cannot be done raises `segcore.UserError`, a ValueError, in one line.
"""
