"""How a core names the kernel variants that are compiled ahead of time, without a GPU.

Each `triton_kernels/<family>/<core>.py` has a function `aot()` yielding AotCases;
`tests/test_ahead_of_time.py` compiles them for every GPU of its list and holds registers, spills and
shared memory to `tests/budgets.json`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class AotCase:
    """One variant of one kernel, as its launcher would specialise it.

    `signature` gives the type of every argument that is a value at launch ("*bf16", "*fp32", "i32",
    "i64", "fp32"); `constexprs` the value of every other one (also None for an absent pointer). Order is
    free, together they must name each argument once. `divisible_by_16` lists the arguments whose address
    or value is a multiple of 16 in real calls: without it masked loads are compiled as scalar ones.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible_by_16: Iterable[str] = ()
    num_warps: int = 4
    num_stages: int = 3

    def source(self) -> Any:
        """What `triton.compile` takes: types, constants and divisibility in the kernel's argument order."""
        from triton.compiler import ASTSource

        names = list(self.fn.arg_names)
        divisible = tuple(self.divisible_by_16)
        given = [*self.signature, *self.constexprs]
        if sorted(given) != sorted(names):
            raise ValueError(
                f"{self.name}: signature and constexprs must name each argument of "
                f"{self.fn.__name__} once; missing {sorted(set(names) - set(given))}, "
                f"unknown {sorted(set(given) - set(names))}, "
                f"twice {sorted(set(self.signature) & set(self.constexprs))}"
            )
        if not set(divisible) <= set(self.signature):
            raise ValueError(
                f"{self.name}: divisible_by_16 names arguments outside the signature: "
                f"{sorted(set(divisible) - set(self.signature))}"
            )
        return ASTSource(
            fn=self.fn,
            signature={name: self.signature.get(name, "constexpr") for name in names},
            constexprs=dict(self.constexprs),
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
        )

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}
