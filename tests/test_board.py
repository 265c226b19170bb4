"""How a study goes on the screen: a view on a terminal that no line garbles, plain lines elsewhere."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from peer_scaling.board import LineBoard
from peer_scaling.publish import write_record
from peer_scaling.record import RunRecord
from peer_scaling.tally import Earlier, Tally, earlier_of
from test_status import write_plan

SCRIPT = """
import os, sys, time
from functools import partial
from peer_scaling.board import make_board
from peer_scaling.pool import Pool, Slot, Work
from peer_scaling.tally import Earlier

class Pieces(Work):
    def name(self, number): return f"piece {number}"
    def flops(self, number): return 1e9
    def earlier(self): return Earlier({"done": 3, "infeasible": 1}, 3e9, 0.0)
    def ended(self, number, exit_code, error, hung):
        print(f"piece {number} [bold]ended[/bold] with {exit_code}")
        self.exit_codes[number] = exit_code

def piece(number):
    print(f"piece {number}: a line of its own")
    os.write(2, b"of another\\nand one without an end")
    time.sleep(0.7)
    return number == 2

if __name__ == "__main__":
    Pool([Slot(), Slot()]).run(Pieces([partial(piece, n) for n in range(5)]), make_board)
    print("after it")
"""
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def drawn(script, **environment):
    """What a command writes to a terminal of 100 x 24."""
    main, end = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "24", **environment}
    process = subprocess.Popen([sys.executable, script], stdout=end, stderr=end, stdin=end, env=env)
    os.close(end)
    data = b""
    while select.select([main], [], [], 120)[0]:
        try:
            data += os.read(main, 65536)
        except OSError:  # Linux's end of a terminal
            break
    os.close(main)
    assert process.wait(60) == 0, data.decode()
    return data.decode()


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "study.py"
    path.write_text(SCRIPT)
    return str(path)


def own_lines(text):
    lines = [line.strip() for line in ESCAPES.sub("", text).replace("\r", "\n").split("\n")]
    return lines, [line for line in lines if "piece" in line and not line.startswith("running")]


EXPECTED = sorted(
    line
    for n in range(5)
    for line in (f"piece {n}: a line of its own", f"piece {n}: of another", f"piece {n}: and one without an end", f"piece {n} [bold]ended[/bold] with {int(n == 2)}")
)  # fmt: skip


def test_a_terminal_shows_the_view_and_every_line_above_it(script):
    text = drawn(script)
    lines, own = own_lines(text)
    assert sorted(own) == EXPECTED, "each once and whole, with the name of its piece"
    counts = [line for line in lines if " cells: " in line]
    assert any("9 cells: 3 done, 2 running, 1 infeasible, 3 left; 3e9 FLOPs done, 5e9 left" in line for line in counts)  # fmt: skip
    assert any(
        re.search(r"1 running, 1 failed.* FLOPs done.*; \d+\.\d s left", line) for line in counts
    )
    assert any(re.fullmatch(r"running  piece 1  0\.\d s", line) for line in lines)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is back"
    assert text.endswith("after it\r\n")


@pytest.mark.parametrize("terminal", [True, False])
def test_elsewhere_there_are_lines_alone(script, terminal):
    if terminal:
        text = drawn(script, TERM="dumb")
    else:
        text = subprocess.run([sys.executable, script], capture_output=True, text=True).stdout
    assert "\x1b" not in text
    assert all(f"piece {n}: a line of its own" in text for n in range(5))
    assert text.splitlines()[-1] == "after it"


ORPHAN = """
import os, signal, sys, time
from functools import partial
from peer_scaling.board import make_board
from peer_scaling.pool import Pool, Slot
sys.path.insert(0, sys.argv[1])
from study import Pieces

def piece(path):
    def save(*_):
        print("saving")
        open(path, "w").close()
        os._exit(75)
    signal.signal(signal.SIGTERM, save)
    print("ready")
    while True:
        print("x")
        time.sleep(0.01)

if __name__ == "__main__":
    Pool([Slot()]).run(Pieces([partial(piece, sys.argv[2])]), make_board)
"""


def test_a_run_saves_when_the_launcher_that_shows_its_lines_is_killed(script, tmp_path):
    orphan, saved = tmp_path / "orphan.py", tmp_path / "saved"
    orphan.write_text(ORPHAN)
    main, end = pty.openpty()
    command = [sys.executable, orphan, str(tmp_path), str(saved)]
    process = subprocess.Popen(command, stdout=end, stderr=end, env={**os.environ, "TERM": "xterm"})
    os.close(end)
    data = b""
    while b"ready" not in data:
        data += os.read(main, 65536)
    process.kill()
    process.wait(60)
    until = time.monotonic() + 60
    while not saved.exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.close(main)
    assert saved.exists()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_time_left_is_reckoned_from_what_the_launch_did():
    clock = Clock()
    tally = Tally(list("abcde"), [4e9, 4e9, 2e9, 2e9, 2e9], 2, Earlier({"done": 9}, 9e9), clock)
    assert tally.seconds_left is None
    tally.started(0)
    tally.started(1)
    clock.now = 8.0
    tally.ended(0, 0)  # 5e8 FLOPs a second
    assert tally.seconds_left == pytest.approx((4e9 + 3 * 2e9 - 4e9) / 5e8 / 2)
    tally.ended(1, None)
    assert tally.counts == {"done": 10, "running": 0, "failed": 0, "left": 4}
    for number, code in ((1, 1), (2, 3), (3, 0)):
        tally.started(number)
        clock.now += 1.0
        tally.ended(number, code)
    assert tally.counts == {"done": 11, "running": 0, "failed": 1, "diverged": 1, "left": 1}
    assert tally.flops == (9e9 + 8e9, 6e9), "a failed cell's are left, a diverged one's are not"
    # 6e9 in 9 s; one cell is left, for one slot.
    assert tally.seconds_left == pytest.approx(2e9 / (6e9 / 9))


def test_of_cells_without_flops_the_number_counts():
    clock = Clock()
    tally = Tally(list("abc"), [0.0] * 3, 1, clock=clock)
    tally.started(0)
    clock.now = 5.0
    tally.ended(0, 0)
    assert tally.text() == "3 cells: 1 done, 2 left; 10.0 s left"


def test_the_view_counts_the_whole_study(tmp_path):
    write_plan(tmp_path, ["a", "b", "c"])
    record = RunRecord(run_id="a", study="s", ffw="dense", variant="dense", size="d8_l2", seed=0, budget=1e9, status="done", reason=None)  # fmt: skip
    write_record(record, tmp_path / "a")
    assert earlier_of(tmp_path, {"b"}) == Earlier({"done": 1, "missing": 1}, 1e9, 1e9)
    tally = Tally(["b"], [1e9], 1, earlier_of(tmp_path, {"b"}))
    tally.started(0)
    assert tally.counts == {"done": 1, "running": 1, "failed": 0, "left": 1}


def test_a_line_now_and_then_if_something_ended(capsys):
    tally = Tally(["a", "b"], [1.0, 1.0], 1)
    board = LineBoard(tally, seconds=0.0)
    board.refresh()
    tally.started(0)
    tally.ended(0, 0)
    board.refresh()
    board.refresh()
    assert capsys.readouterr().out.count("2 cells: 1 done, 1 left; 1e0 FLOPs done, 1e0 left") == 1
