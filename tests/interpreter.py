"""Triton's interpreter in a quarter of the time, for the same results.

Before every launch it replaces the functions of `triton.language` by its own, and again at every
call of a device function, where that changes nothing. And it computes every sum of integers once
more in int64, for an assertion that it then leaves out, as it does without `debug`.
"""

import dataclasses
import functools


def hasten():
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_LangPatchScope"):  # another Triton's
        return
    patch, core = interpreter._patch_lang, interpreter.tl.core

    @functools.cache
    def languages(fn):
        return [v for v in fn.__globals__.values() if v is interpreter.tl or v is core]

    def patch_unless_done(fn):
        if any(core.is_builtin(language.load) for language in languages(fn)):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_unless_done
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
