"""Channel, scope and writer: order, bounds, errors, and no thread left, whatever happens."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.concurrency import (
    Channel,
    ChannelClosedError,
    Scope,
    SharedLock,
    Writer,
    short_switch_interval,
)
from pipeline.errors import StallError
from pipeline.testing import Gate


@given(
    st.integers(1, 9), st.integers(0, 60), st.none() | st.integers(0, 9), st.integers(1, 4), st.integers(0, 5)
)
def test_every_item_arrives_once_and_in_order(depth, count, low_water, num_producers, start):
    """Whatever the depth, the low-water mark and the producers, nothing is lost, doubled or overtaken."""
    channel = Channel(depth, low_water, start)

    def produce():
        with contextlib.suppress(ChannelClosedError):
            while True:
                position = channel.claim()
                if position >= start + count:
                    channel.end(position)
                else:
                    channel.put(position, position)

    with Scope() as scope:
        for number in range(num_producers):
            scope.start(produce, name=f"producer/{number}", stop=channel.abandon)
        assert list(channel) == list(range(start, start + count))
    assert channel.statistics().num_items == count


def test_the_fork_server_has_the_interpreters_options():
    """``-O`` and ``-W`` decide what a dataset's code does, in a worker too."""
    code = (
        "from pipeline.concurrency import fork_server; server = fork_server(()); "
        "print(server._process.args); server.close()"
    )
    command = [sys.executable, "-O", "-W", "error::ImportWarning", "-c", code]
    root = Path(__file__).parents[2]
    said = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60, check=True).stdout
    options = said.partition("'-c'")[0]
    assert "'-O'" in options
    assert "'-Werror::ImportWarning'" in options


def test_a_full_channel_blocks_its_producer():
    """No more positions are claimed than the depth; the producer sleeps until the low-water mark."""
    channel, made = Channel(4, low_water=1), []

    def produce():
        for _ in range(10):
            position = channel.claim()
            made.append(position)
            channel.put(position, position)
        channel.end(10)

    with Scope() as scope:
        scope.start(produce, name="producer", stop=channel.abandon)
        items = iter(channel)
        found = [next(items)]
        while channel.statistics().num_full == 0:  # the producer fills it and finds it full
            found.append(next(items))
        assert len(made) - len(found) <= 4
        assert found + list(items) == list(range(10))


def test_an_item_that_is_late_holds_up_those_behind_it():
    """The consumer waits for the first position while the second lies ready."""
    channel, gate = Channel(4), Gate()
    first, second = channel.claim(), channel.claim()
    channel.put(second, "second")

    def produce():
        gate.pass_through()
        channel.put(first, "first")
        channel.stop()

    with Scope() as scope:
        scope.start(produce, name="producer", stop=gate.open)
        gate.open()
        assert list(channel) == ["first", "second"]
    assert channel.position == 2


def test_an_error_arrives_behind_the_items_before_it():
    """The consumer sees what was made before the producer failed, then the very same exception."""
    channel, error = Channel(4), KeyError("mine")
    channel.put(channel.claim(), 1)
    channel.end(channel.claim(), error)
    items = iter(channel)
    assert next(items) == 1
    with pytest.raises(KeyError) as caught:
        next(items)
    assert caught.value is error


def test_the_error_of_the_first_position_is_the_one_that_counts():
    """Two producers fail; the consumer raises what a plain loop would have met first."""
    channel, first, second = Channel(4), KeyError("first"), KeyError("second")
    positions = channel.claim(), channel.claim()
    channel.end(positions[1], second)
    channel.end(positions[0], first)
    with pytest.raises(KeyError) as caught:
        next(iter(channel))
    assert caught.value is first


def test_what_was_claimed_is_delivered_after_a_stop():
    """Nobody claims after a stop, and nothing that was claimed is lost."""
    channel = Channel(4)
    position = channel.claim()
    channel.stop()
    with pytest.raises(ChannelClosedError):
        channel.claim()
    channel.put(position, "made")
    assert list(channel) == ["made"]


def test_a_producer_stops_when_the_consumer_has_gone():
    """An abandoned channel wakes its producers, which learn that nobody takes items any more."""
    channel = Channel(1)
    gate = Gate()

    def produce():
        with pytest.raises(ChannelClosedError):
            while True:
                channel.put(channel.claim(), 0)
                gate.pass_through()

    gate.open()
    with Scope() as scope:
        thread = scope.start(produce, name="producer", stop=channel.abandon)
        gate.wait_for_arrivals(1)
    assert not thread.is_alive()


def test_a_scope_raises_what_its_thread_let_out():
    """An error of a thread travels to the owner of the scope."""

    def fail():
        raise ValueError("in the thread")

    with pytest.raises(ValueError, match="in the thread"), Scope() as scope:
        scope.start(fail, name="failing", stop=lambda: None)


def test_a_scope_joins_before_it_lets_an_exception_pass():
    """When the block fails, its threads have ended before the exception goes on."""
    gate = Gate()
    with pytest.raises(KeyError), Scope() as scope:
        thread = scope.start(gate.pass_through, name="waiting", stop=gate.open)
        raise KeyError
    assert not thread.is_alive()


@given(st.lists(st.integers()), st.integers(1, 8))
def test_a_writer_handles_everything_in_order(items, max_pending):
    """Leaving the scope drains what is pending; nothing is lost, however little may wait."""
    handled = []
    with Scope() as scope:
        writer = Writer(scope, handled.extend, name="writer", gather_s=0, max_pending=max_pending)
        for item in items:
            writer.put(item)
    assert handled == items


def test_flush_returns_when_all_is_handled():
    """After a flush, what was put before it has been handled, gathering or not."""
    handled = []
    with Scope() as scope:
        writer = Writer(scope, handled.extend, name="writer", gather_s=60)
        for number in range(5):
            writer.put(number)
        writer.flush()
        assert handled == [0, 1, 2, 3, 4]
        writer.flush()


def test_a_full_writer_blocks_its_caller():
    """With so many pending, a put waits until the writer has caught up."""
    gate, handled = Gate(), []

    def handle(items):
        gate.pass_through()
        handled.extend(items)

    with Scope() as scope:
        writer = Writer(scope, handle, name="writer", gather_s=0, max_pending=2)
        writer.put(0)
        gate.wait_for_arrivals(1)
        opener = threading.Thread(target=gate.open)
        writer.put(1)
        opener.start()
        writer.put(2)  # blocks until the gate is open
        opener.join()
        writer.flush()
    assert handled == [0, 1, 2]


def test_an_error_of_the_handler_is_raised_by_the_next_call():
    """The first error ends the work and reaches the caller; the scope still ends."""
    error = OSError("disk full")

    def fail(items):
        raise error

    with Scope() as scope:
        writer = Writer(scope, fail, name="writer", gather_s=0)
        writer.put(1)
        with pytest.raises(OSError, match="disk full"):
            writer.flush()
        with pytest.raises(OSError, match="disk full"):
            writer.put(2)


def test_a_consumer_does_not_wait_for_ever():
    """With a time-out, a channel that stays empty raises StallError with its statistics."""
    channel = Channel(3, stall_timeout_s=0.02)
    channel.put(channel.claim(), 1)
    items = iter(channel)
    assert next(items) == 1
    with pytest.raises(StallError, match=r"no batch for 0\.02 s.*\n.*1 items put, at most 3") as caught:
        next(items)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.statistics == channel.statistics()
    channel.put(channel.claim(), 2)
    assert next(iter(channel)) == 2


def leave_hanging(gate):
    with Scope(join_timeout_s=0.02) as scope:
        thread = scope.start(gate.pass_through, name="stuck", stop=lambda: None)
        gate.wait_for_arrivals(1)
    return thread


def test_a_thread_that_hangs_is_left_behind_with_its_stack():
    """A scope with a time-out ends nevertheless, and a warning shows where the thread stands."""
    gate = Gate()
    with pytest.warns(RuntimeWarning, match=r"(?s)thread 'stuck' hangs.*pass_through"):
        thread = leave_hanging(gate)
    assert thread.is_alive()
    gate.open()
    thread.join()


def test_a_shared_lock_is_held_by_many_or_by_one_alone():
    """Who wants it alone waits for those that have it, and is let in before whoever comes later."""
    lock, order = SharedLock(), []
    gates = {name: Gate() for name in ("first", "second", "alone")}

    def hold(name, kind):
        with getattr(lock, kind)():
            order.append(name)
            if name in gates:
                gates[name].pass_through()
            order.append(f"{name} ends")

    def start(name, kind):
        thread = threading.Thread(target=hold, args=(name, kind))
        thread.start()
        return thread

    threads = [start("first", "shared"), start("second", "shared")]
    gates["first"].wait_for_arrivals(1)
    gates["second"].wait_for_arrivals(1)  # both have it
    threads.append(start("alone", "alone"))
    while not lock._num_lone:
        pass
    threads.append(start("later", "shared"))
    gates["first"].open()
    gates["second"].open()
    gates["alone"].wait_for_arrivals(1)
    assert order[-1] == "alone"
    gates["alone"].open()
    for thread in threads:
        thread.join()
    assert set(order[:2]) == {"first", "second"}
    assert order[4:] == ["alone", "alone ends", "later", "later ends"]


def test_the_switch_interval_is_put_back():
    """After the block, and an error in it; not if somebody has set another meanwhile, or had a shorter."""
    before = sys.getswitchinterval()
    try:
        with short_switch_interval():
            assert sys.getswitchinterval() < before
        assert sys.getswitchinterval() == pytest.approx(before)
        with pytest.raises(KeyError), short_switch_interval():
            raise KeyError
        assert sys.getswitchinterval() == pytest.approx(before)
        with short_switch_interval():
            sys.setswitchinterval(0.25)
        assert sys.getswitchinterval() == pytest.approx(0.25)
        sys.setswitchinterval(1e-5)
        with short_switch_interval():
            assert sys.getswitchinterval() == pytest.approx(1e-5)
    finally:
        sys.setswitchinterval(before)
