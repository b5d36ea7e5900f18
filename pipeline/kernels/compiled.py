"""How functions over numpy arrays become machine code: without the interpreter's lock, kept on disk between processes.

numba keeps compiled code by the name and date of the function's own file, and would go on using it after a change in a file
that is compiled into it. So code is kept in a folder named by a digest of all kernels' sources.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from filelock import FileLock
from numba import config, njit, types
from numba.extending import intrinsic
from platformdirs import user_cache_path

Function = TypeVar("Function", bound=Callable[..., Any])
SETTINGS: Any = config  # its attributes are made when it is imported


@cache
def _cache_folder() -> Path | None:
    """Where this state of the kernels keeps its code: under NUMBA_CACHE_DIR if it is set; None when it cannot be written."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    place = Path(SETTINGS.CACHE_DIR) if SETTINGS.CACHE_DIR else user_cache_path("channel-merging")
    folder = place / "kernels" / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _save_one_at_a_time(made: Any, folder: Path) -> None:
    """Let one process at a time add code to the folder.

    numba writes its index, then the code, and locks neither: of two processes that compile one function for two types, the
    index of one may come to name the code of the other.
    """
    files = made._cache._cache_file
    save = files.save

    def save_alone(key: Any, data: Any) -> None:
        with FileLock(folder / "lock"):
            save(key, data)

    files.save = save_alone


def _jitted(function: Function, **options: Any) -> Function:
    folder, before = _cache_folder(), SETTINGS.CACHE_DIR
    SETTINGS.CACHE_DIR = str(folder or before)  # read while the decorator runs; other packages keep their own
    try:
        made = njit(cache=folder is not None, nogil=True, error_model="numpy", **options)(function)
        if folder is not None:
            _save_one_at_a_time(made, folder)
    finally:
        SETTINGS.CACHE_DIR = before
    return cast("Function", made)


def compiled(function: Function) -> Function:
    """The function as machine code (numba). Sums keep the order in which they are written."""
    return _jitted(function)


def merged_in(function: Function) -> Function:
    """``compiled``, for functions of a tile: their code is put into their callers, as arrays are many words to hand over."""
    return _jitted(function, forceinline=True)


def regrouping(function: Function) -> Function:
    """``compiled``, but sums may be regrouped to use vectors: for float64 sums whose last bits do not matter."""
    return _jitted(function, fastmath={"reassoc", "nsz"}, forceinline=True)


def inlined(function: Function) -> Function:
    """A small function of compiled ones, put into its callers, so that their loops become vector code."""
    return cast("Function", njit(inline="always")(function))


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """A pool for this process: threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="kernel")


def over_rows(function: Callable[[int, int], None], rows: int, threads: int) -> None:
    """Call ``function(start, stop)`` on consecutive ranges of rows, on several threads; rows must not depend on each other."""
    if threads <= 1 or rows <= 1:
        function(0, rows)
        return
    parts = min(rows, 4 * threads)  # more than threads: some rows cost more than others
    cuts: Sequence[int] = [rows * i // parts for i in range(parts + 1)]
    list(_pool(threads, os.getpid()).map(function, cuts[:-1], cuts[1:]))


@intrinsic
def _unowned(context: Any, array: Any) -> Any:
    """Inside compiled code, the same array without its owner, whose references are then not counted.

    Counting is atomic: slices taken in inner loops by several threads would spend most of their time on it. The caller of
    the outermost function keeps its arguments alive. An array that is made inside is freed after its last use, so what makes
    one uses it once more at the end.
    """

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        view = target.make_array(signature.args[0])(target, builder, value=arguments[0])
        view.meminfo = target.get_constant_null(types.voidptr)
        view.parent = target.get_constant_null(types.pyobject)
        return view._getvalue()

    return array(array), generate


unowned: Callable[[Any], Any] = cast("Any", _unowned)  # its own first argument is the compiler's
