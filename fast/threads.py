"""The threads that run kernels: `kernel` compiles a function of (task, slot, ...), `POOL.run` runs all its tasks.

It computes nothing of the specification. It replaces `Threads` of tinygpt.py, section 9, which hands shares of the
tasks to a ThreadPoolExecutor. What happens at a launch, and why:

1. The caller, in machine code, writes what to run into one array of words: function, arguments, number of tasks.
2. It opens the gate and counts the launch. Helpers look at that count all the time (`serve`) and come in: no thread is
   woken, which takes 100 us, and nobody takes the interpreter's lock, which takes 70; a launch takes a few us.
3. All threads draw task numbers from one counter until there are no more: a slow thread does fewer, none waits.
4. The caller closes the gate and waits for the helpers that are still inside; one that comes later turns back.
5. A helper that has looked SPINS times without a launch goes to sleep; the next launch wakes it. With more threads
   than cores one that comes too late sleeps at once, and no more are woken than there are cores: those that look for a
   launch would take the time of those that work.

Read `kernel` and `Pool.run` first, then what they are made of, from the top.
"""

import _thread
import functools
import os
import threading
from types import FunctionType

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, compiler
from numba.extending import intrinsic

from fast.jit import COMPILE, cached
from fast.memory import word_at
from tinygpt import THREADS, aligned, count_cores, note_once

# The words of a launch. Each that threads contend for has a cache line of its own.

LAUNCH, GATE, NEXT, TASKS = 0, 8, 16, 24  # launches so far; threads at work, + CLOSED; the next task; their number
FUNCTION, ARGUMENTS, FAILED, WORDS = 25, 26, 27, 32  # what to call, with what, whether it failed; words in all
CLOSED = 1 << 32
SPINS = 1 << 20  # looks at a word, some 0.5 ms, before a thread goes to sleep


@intrinsic
def look(typing_context, address):
    """The 64-bit word at an address, read from memory each time."""

    def build(context, builder, signature, args):
        return builder.load_atomic(word_at(builder, args[0]), "seq_cst", 8)

    return types.int64(types.intp), build


@intrinsic
def fetch_add(typing_context, address, value):
    """Add to the 64-bit word at an address, atomically; returns what it was before."""

    def build(context, builder, signature, args):
        return builder.atomic_rmw("add", word_at(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.intp, types.int64), build


@intrinsic
def put(typing_context, address, value):
    """Store a 64-bit word at an address: a thread that sees it also sees what was stored before."""

    def build(context, builder, signature, args):
        builder.store_atomic(args[1], word_at(builder, args[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), build


@intrinsic
def replace(typing_context, address, old, new):
    """Make the 64-bit word at an address `new` if it is `old`, in one step; whether it was."""

    def build(context, builder, signature, args):
        found = builder.cmpxchg(word_at(builder, args[0]), args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(found, 1)

    return types.boolean(types.intp, types.int64, types.int64), build


def compile_into(typing_context, context, body, argument_types):
    """Compile body(task, slot, *arguments) into the kernel that is being compiled. A library of its own, which is what
    Numba makes of a called function, would be optimised twice; with inlining, this took a quarter off a cold start."""
    jitted, flags = body.dispatcher, compiler.Flags()
    jitted.targetdescr.options.parse_as_flags(flags, jitted.targetoptions)
    flags.no_compile, kinds = True, (types.int64, types.int64, *argument_types)
    library = context.active_code_library
    return compiler.compile_extra(typing_context, context, jitted.py_func, kinds, None, flags, {}, library)


def function_of_tasks(context, module, compiled, arguments):
    """LLVM function (address of the words, slot) that all threads run: while there are tasks, draw the next number and
    call body(task, slot, *arguments)."""
    i64 = ir.IntType(64)
    name = compiled.fndesc.llvm_func_name + "_tasks"
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64, i64]), name)
    function.linkage = "internal"
    words, slot = function.args
    begin, take, do, done = (function.append_basic_block(label) for label in ("begin", "take", "do", "done"))
    builder = ir.IRBuilder(begin)
    pointer = builder.inttoptr(builder.load(word_at(builder, words, ARGUMENTS)), arguments)
    rest = cgutils.unpack_tuple(builder, builder.load(pointer))
    count = builder.load(word_at(builder, words, TASKS))
    builder.branch(take)
    builder.position_at_end(take)
    task = builder.atomic_rmw("add", word_at(builder, words, NEXT), i64(1), "seq_cst")
    builder.cbranch(builder.icmp_signed("<", task, count), do, done)
    builder.position_at_end(do)
    status, _ = context.call_internal_no_propagate(builder, compiled.fndesc, compiled.signature, (task, slot, *rest))
    with builder.if_then(status.is_error):
        builder.store(i64(1), word_at(builder, words, FAILED))
    builder.branch(take)
    builder.position_at_end(done)
    builder.ret_void()
    return function


@intrinsic
def open_gate(typing_context, words, count, body, args):
    """Describe the launch, open the gate to the helpers, work with them, close it, wait for those still inside."""

    def build(context, builder, signature, values):
        i64, (words, count, _, arguments) = ir.IntType(64), values
        compiled = compile_into(typing_context, context, body, args.types)
        arguments = cgutils.alloca_once_value(builder, arguments)
        function = function_of_tasks(context, builder.module, compiled, arguments.type)
        address_of = {FUNCTION: builder.ptrtoint(function, i64), ARGUMENTS: builder.ptrtoint(arguments, i64)}
        for index, value in {NEXT: i64(0), TASKS: count, FAILED: i64(0), **address_of}.items():
            builder.store(value, word_at(builder, words, index))
        gate = word_at(builder, words, GATE)
        builder.atomic_rmw("sub", gate, i64(CLOSED), "seq_cst")
        builder.atomic_rmw("add", word_at(builder, words, LAUNCH), i64(1), "seq_cst")
        builder.call(function, (words, i64(0)))
        builder.atomic_rmw("add", gate, i64(CLOSED), "seq_cst")
        wait, done = builder.append_basic_block("wait"), builder.append_basic_block("done")
        builder.branch(wait)
        builder.position_at_end(wait)
        builder.cbranch(builder.icmp_signed("==", builder.load_atomic(gate, "seq_cst", 8), i64(CLOSED)), done, wait)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64, body, args), build


@intrinsic
def join(typing_context, words, slot):
    """Help with the launch that the words describe."""

    def build(context, builder, signature, args):
        function = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 2).as_pointer()
        builder.call(builder.inttoptr(builder.load(word_at(builder, args[0], FUNCTION)), function), args)
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), build


def launch(words, count, *args):
    open_gate(words, count, body, args)  # noqa: F821  each kernel is a copy of this function with a `body` of its own


def kernel(function):
    """What POOL.run runs: function(task, slot, *args) for each task, on all threads, without the interpreter's lock.

    Numba gets a copy of `launch` for each kernel, whose `body` is a global: its cache cannot keep closures over jitted
    functions. Name, file and line are the function's: by these the cache finds it and notices that its file changed."""
    place = function.__code__
    code = launch.__code__.replace(
        co_name=function.__name__, co_filename=place.co_filename, co_firstlineno=place.co_firstlineno
    )
    body = njit(**COMPILE, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
    copy = FunctionType(code, {"open_gate": open_gate, "body": body, "__name__": function.__module__})
    copy.__qualname__ = function.__qualname__
    return cached(njit(**COMPILE, no_cfunc_wrapper=True, nogil=True), copy)


@functools.partial(cached, njit(**COMPILE, nogil=True))
def serve(at, slot, seen, spins, crowded):
    """Take part in every launch after number `seen`, until none has come for `spins` looks or, if there are more
    threads than cores, one is over already; the last one's number."""
    idle = 0
    while idle < spins:
        idle += 1
        number = look(at + 8 * LAUNCH)
        if number != seen:
            seen, idle = number, 0
            if fetch_add(at + 8 * GATE, 1) < CLOSED:
                join(at, slot)
            elif crowded:
                idle = spins
            fetch_add(at + 8 * GATE, -1)
    return seen


class Pool:
    """The threads that run tasks. One caller computes at a time; others wait for it."""

    def __init__(self):
        self.threads, self.cores = THREADS.count, count_cores()
        self.compiles = None  # or a function: True for the names of kernels that `run` is to compile, and not to run
        self.begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.begin)

    def begin(self):
        """Have no helpers yet, as in a child process: fork copies no threads, and locks as they are."""
        self.lock, self.changed = threading.Lock(), threading.Condition()
        self.team = 0  # number of the helpers that a launch may count on; those before have left, or will
        self.started, self.serving, self.asleep, self.wakes = 0, 0, 0, 0  # helpers; of any team, not ended; asleep
        self.words = aligned(WORDS, np.int64)
        self.words[GATE] = CLOSED

    def resize(self, threads):
        """Use `threads` threads from now on; they start when there is work."""
        with self.lock, self.changed:
            self.team += 1
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.serving)
            self.threads, self.started = threads, 0

    def start(self):
        """Start helpers, as many as the system allows. None is waited for: threading.Thread waits for ever for one that
        found no memory to begin with."""
        try:
            while self.started + 1 < self.threads:
                place = (self.started + 1, int(self.words[LAUNCH]), self.team, self.words)
                _thread.start_new_thread(self.help, place)
                self.started += 1
        except (RuntimeError, MemoryError) as error:
            note_once(f"{error}: computing with the threads that there are")

    def help(self, slot, seen, team, words):
        with self.changed:
            if team != self.team:
                return
            self.serving += 1
        while team == self.team:
            seen = serve(words.ctypes.data, slot, seen, SPINS, self.threads > self.cores)
            with self.changed:
                wakes, self.asleep = self.wakes, self.asleep + 1
                self.changed.wait_for(lambda: self.wakes != wakes or team != self.team)  # noqa: B023
                self.asleep -= 1
        with self.changed:
            self.serving -= 1
            self.changed.notify_all()

    def wake(self):
        """Wake the helpers that sleep, or as many as there are cores for."""
        with self.changed:
            self.wakes += 1
            self.changed.notify(min(self.asleep, max(1, self.cores - 1)))

    def run(self, function, count, *args):
        """function(task, slot, *args) for each task; slot is the thread's number, for its own scratch memory."""
        if self.compiles is not None:
            return self.compiles(function.__name__) and function(self.words.ctypes.data, 0, *args)
        with self.lock:
            if count > 1 and self.threads > self.started + 1:
                self.start()
            if self.asleep and self.serving - self.asleep < max(1, self.cores - 1):
                self.wake()
            function(self.words.ctypes.data, count, *args)
            if self.words[FAILED]:
                raise SystemError(f"{function.__name__} failed in one of its {count} tasks")


POOL = Pool()
