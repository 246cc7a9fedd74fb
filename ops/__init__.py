"""Ops: every torch function that has a rule, under torch's name, plus `out=` and `over=`."""

from . import contract, pointwise, reduce
from .audit import audit as audit

_ROOMS = (pointwise, contract, reduce)
for _room in _ROOMS:
    globals().update(
        {
            name: value
            for name, value in vars(_room).items()
            if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == _room.__name__
        }
    )
