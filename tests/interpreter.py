"""A quarter of the time of Triton's interpreter, spent once.

At every launch, and at every call of a jitted function within a kernel, it goes through all members of
triton.language, of its tensor class and of others for the built-in functions to replace. Which ones are built in
does not change.
"""

import inspect

import triton.language as tl
from triton.runtime import interpreter


def remember_builtins():
    names = {}

    def patch(package, builder, *scope):
        if package not in names:
            members = inspect.getmembers(package)
            names[package] = [name for name, member in members if tl.core.is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            # Not so any more where a function called from a kernel finds it replaced.
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, *scope)

    if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
        interpreter._patch_builtin = patch
