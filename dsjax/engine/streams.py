"""Text as it comes: the thread that runs the engine while somebody listens, and those who do."""

import asyncio
import atexit
import contextlib
import queue
import signal
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator

from dsjax.engine.core import Core
from dsjax.engine.requests import Event, Request


class Listener:
    """News of one request, for a thread. What is not read yet waits here, so a slow reader keeps nobody."""

    def __init__(self):
        self._news: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def put(self, event: Event) -> None:
        """Called by the engine."""
        self._news.put(event)

    def get(self) -> Event:
        """The next, as soon as there is one."""
        return self._news.get()


class AsyncListener:
    """News of one request, for the event loop that runs where this is made."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Event] = asyncio.Queue()
        self.on_closed: Callable[[], None] = lambda: None  # called if there is news and the loop is closed

    def put(self, event: Event) -> None:
        """Called by the engine, in its own thread."""
        try:
            self._loop.call_soon_threadsafe(self._news.put_nowait, event)
        except RuntimeError:
            self.on_closed()

    async def get(self) -> Event:
        """The next, as soon as there is one."""
        return await self._news.get()


class Driver:
    """Runs the engine in a thread, from the first listener to the end of all work.

    Args:
      core: what to run.
    """

    def __init__(self, core: Core):
        self._core = core
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._waits = self._stopped = False
        _drivers.add(self)

    def pieces(self, request: Request, listener: Listener) -> Iterator[str]:
        """Text of a request that has been queued."""
        self._start()
        return _Pieces(self._core, request, listener)

    def apieces(self, request: Request, listener: AsyncListener) -> AsyncIterator[str]:
        """As `pieces`, for asyncio."""
        listener.on_closed = lambda: self._core.abort(request)
        self._start()
        return _AsyncPieces(self._core, request, listener)

    def resume(self) -> None:
        """Go on with what was under way when the pages were given back; there are new ones."""
        with self._lock:
            waits, self._waits = self._waits, False
        if waits:
            self._start()

    def stop(self) -> None:
        """End the thread after the step that it is in, whatever is left to do."""
        self._stopped = True
        thread = self._thread
        if thread is not None:
            thread.join()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="dsjax-engine", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        try:
            while self._has_work() and self._advance():
                pass
        except BaseException as error:
            with self._lock:
                self._thread = None
            self._core.fail(error)

    def _has_work(self) -> bool:
        # Looked at under the lock, so that work that comes now finds a thread or starts one.
        with self._lock:
            goes_on = self._core.has_work() and not self._stopped
            if not goes_on:
                self._thread = None
            return goes_on

    def _advance(self) -> bool:
        """A step, unless the pages have been given back: `resume` goes on."""
        with self._core.lock:
            if self._core.state is not None:
                self._core.advance()
                return True
            with self._lock:
                self._thread, self._waits = None, True
            return False


_drivers: "weakref.WeakSet[Driver]" = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """A thread that is inside XLA when Python ends takes the process down with an abort."""
    for driver in list(_drivers):
        driver.stop()


class _Reader:
    """What readers in threads and in event loops share: a request ends with whoever reads it."""

    def __init__(self, core: Core, request: Request):
        self._core, self._request = core, request
        self._ended = False
        self._error: BaseException | None = None

    def _take(self, event: Event) -> str:
        """The text of an event; notes how it ends."""
        if event.finish_reason is not None:
            self._ended, self._error = True, event.error
        return event.text

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _leave(self) -> None:
        if not self._ended:
            self._ended = True
            if not self._request.finished:
                self._core.abort(self._request)

    __del__ = _leave


class _Pieces(_Reader):
    """An iterator that ends its request when it is dropped, even if it was never begun."""

    def __init__(self, core: Core, request: Request, listener: Listener):
        super().__init__(core, request)
        self._listener = listener

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while not self._ended:
            if text := self._take(self._listener.get()):
                return text
        self._raise_error()
        raise StopIteration

    def close(self) -> None:
        """End the request."""
        self._leave()


class _AsyncPieces(_Reader):
    """As `_Pieces`; not an async generator, since one that was never begun ends without a word."""

    def __init__(self, core: Core, request: Request, listener: AsyncListener):
        super().__init__(core, request)
        self._listener = listener

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while not self._ended:
            try:
                event = await self._listener.get()
            except BaseException:  # the task was cancelled
                self._leave()
                raise
            if text := self._take(event):
                return text
        self._raise_error()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the request."""
        self._leave()


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits for the end of a step, so that none is left half done. Yields what raises it, if it was pressed."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    pressed = []

    def note(number, frame):
        if pressed:  # pressed again: at once
            signal.default_int_handler(number, frame)
        pressed.append(number)

    def check():
        if pressed:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # somebody else decides what Ctrl-C does
        yield lambda: None
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
