"""What the static gate compiles of `cross_entropy`."""

from __future__ import annotations

from collections.abc import Callable

from static_gate import BF16, FP32, INT64, Case

from shardwise.kernels import cross_entropy_triton as ce


def ce_parts(size: int) -> Case:
    how = ce.reading_launch(size)
    types = {"logits": BF16, "labels": INT64, "lse": FP32, "target": FP32, "start": "i32"}
    return (
        ce.parts_forward,
        types,
        {"SIZE": size, "COUNT": size, "BLOCK": how.block, "STAGES": how.stages},
        how.warps,
    )


def ce_grad(size: int) -> Case:
    how = ce.writing_launch(size)
    types = dict.fromkeys(("grad_lse", "grad_target", "lse"), FP32)
    types |= {"logits": BF16, "labels": INT64, "result": BF16, "start": "i32", "rows": "i32"}
    return ce.parts_grad, types, {"SIZE": size, "COUNT": size, "BLOCK": how.block}, how.warps


def ce_loss_and_grad(size: int, count: int | None = None) -> Case:
    how = ce.reading_launch(size)
    types = {"logits": BF16, "labels": INT64, "scale": FP32, "loss": FP32}
    return (
        ce.loss_and_grad,
        types,
        {"SIZE": size, "COUNT": count or size, "BLOCK": how.block, "STAGES": how.stages},
        how.warps,
    )


CASES: dict[str, Callable[[], Case]] = {
    "cross_entropy_parts 128256": lambda: ce_parts(128256),
    "cross_entropy_parts_backward 128256": lambda: ce_grad(128256),
    "loss_and_grad 32000": lambda: ce_loss_and_grad(32000),
    "loss_and_grad 50257 of 50304": lambda: ce_loss_and_grad(50304, 50257),
    "loss_and_grad 128256": lambda: ce_loss_and_grad(128256),
}
