"""extras/report.py: a page that says what the logs say, and no more; logs handed on as they grow."""

import html.parser
import json
import math
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import invoke, read_log, refusal, trained, workshop, write_stories

import tinygpt

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "extras"))

import report

VOID = {"meta", "link", "input", "br"}
HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)></style></title>"


# == tools =============================================================================================================


class Page(html.parser.HTMLParser):
    """A parsed page: its elements, the text of each kind of element; AssertionError where tags do not nest."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(("/".join(self.open), text))

    def text(self, end=""):
        return [text for path, text in self.texts if path.endswith(end)]

    def cells(self):
        """The texts of the page's table rows, one list a row; what stands in one cell is joined."""
        rows = re.findall(r"<tr[^>]*>(.*?)</tr>", self.rawdata_kept, re.DOTALL)
        cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]
        return [[html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in row] for row in cells]

    def feed(self, source):
        self.rawdata_kept = source
        super().feed(source)


def page_of(*paths):
    return Page(report.page(report.read_logs([Path(path) for path in paths])))


def update(step, loss=3.0, seconds=None, **more):
    entry = {"step": step, "loss": loss, "lr": 1e-3 / step, "norm": 0.5, "tokens": 64 * step}
    return entry | {"seconds": 2.0 * step if seconds is None else seconds} | more


def validation(step, bits, stories=()):
    return {"step": step, "val_nats": 2 * bits, "val_bits_per_byte": bits, "stories": list(stories)}


def final(step, bits):
    return {"step": step, "final_val_nats": 2 * bits, "final_val_bits_per_byte": bits, "tokens": 5000}


def settings(**changes):
    s = dict(lr=1e-3, steps=20, grad_clip=1.0, seed=0, data="a text", prompts=["Lily"], batch_size=2) | changes
    config = dict(vocab_size=300, seq_len=32, width=24, layers=2, heads=3)
    return {"settings": s, "config": config, "command": "python train.py --size tiny"}


def write_log(folder, entries):
    """A run's folder with a log of these entries (dicts, or bytes as they are) -> the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [entry if isinstance(entry, bytes) else json.dumps(entry).encode() for entry in entries]
    (folder / "log.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return folder


def whole(bits=1.5, **changes):
    """The entries of a run of 20 updates that got to its end."""
    entries = [settings(**changes)]
    for step in range(1, 21):
        entries.append(update(step, loss=6 / step**0.3))
        entries += [validation(step, bits + (20 - step) / 40, ["Lily ran."])] if step % 5 == 0 else []
    return [*entries, final(20, bits - 0.01)]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A run of train.py itself, with stories: its folder."""
    with workshop(tmp_path_factory.mktemp("real")) as folder:
        text = write_stories(folder / "stories.txt")
        trained("--data", text, "--kernels", "numpy", "--steps", 12, "--eval-every", 4, "--prompt", "Lily")
    return folder / "runs" / "tiny"


# == 1  the log ========================================================================================================


def test_every_figure_of_a_run_is_that_of_its_log(real):
    entries, log = read_log(real), report.read_log(real / "log.jsonl", "tiny")
    updates = [e for e in entries if "loss" in e]
    assert [{name: row[name] for name in report.COLUMNS} for row in log.updates] == updates
    assert [(v["step"], v["nats"], v["bits"]) for v in log.validations] == [
        (e["step"], e["val_nats"], e["val_bits_per_byte"]) for e in entries if "val_nats" in e
    ]
    assert [v["stories"] for v in log.validations] == [e["stories"] for e in entries if "stories" in e]
    assert all(story.startswith("Lily") for v in log.validations for story in v["stories"])
    last, r = entries[-1], report.result(log)
    assert (r["bits_per_byte"], r["nats_per_token"]) == (last["final_val_bits_per_byte"], last["final_val_nats"])
    assert (r["updates"], r["tokens"], r["state"]) == (12, updates[-1]["tokens"], "finished")
    cfg = tinygpt.Config(**entries[0]["config"])
    assert r["parameters"] == tinygpt.count_parameters(cfg)[0]
    assert not log.problems and log.command == entries[0]["command"]


def test_speed_is_the_median_between_updates_and_not_the_first_which_compiles(tmp_path):
    entries = [settings(), *(update(step, seconds=100.0 + 2 * step + 50 * (step > 3)) for step in range(1, 8))]
    log = report.read_log(write_log(tmp_path / "run", entries) / "log.jsonl", "run")
    assert report.result(log)["tokens_per_second"] == 32


def test_a_run_that_went_on_counts_its_seconds_on(tmp_path):
    seconds = [10.0, 12.0, 14.0, 5.0, 7.0]  # it was stopped after three updates
    entries = [settings(), *(update(step, seconds=x) for step, x in enumerate(seconds, 1))]
    log = report.read_log(write_log(tmp_path / "run", entries) / "log.jsonl", "run")
    assert [row["elapsed"] for row in log.updates] == [10, 12, 14, 19, 21]


def test_a_log_that_is_cut_anywhere_is_shown_as_far_as_it_goes(tmp_path):
    data = (write_log(tmp_path / "whole", whole()) / "log.jsonl").read_bytes()
    begin = data.index(b"\n") + 1
    for size in [begin, *range(begin + 1, len(data), 53), len(data) - 1]:
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "log.jsonl").write_bytes(data[:size])
        log = report.read_log(folder / "log.jsonl", "run")
        lines = data[:size].split(b"\n")
        is_whole = report.parse(lines[-1])[0] is not None  # only its end of line is missing
        entries = [json.loads(line) for line in (lines if is_whole else lines[:-1])]
        assert [row["loss"] for row in log.updates] == [e["loss"] for e in entries if "loss" in e]
        assert bool(log.problems) == (not is_whole and lines[-1] != b"")
        page = page_of(folder)
        assert any("is incomplete" in text for text in page.text("/p")) == bool(log.problems)
        steps = sum("loss" in e for e in entries)
        state = "finished" if "final_val_nats" in entries[-1] else "not scored" if steps == 20 else "at update"
        assert report.result(log)["state"].startswith(state)


BROKEN = {
    "bytes that are no text": b"\xff\xfe\x00",
    "no JSON": b"step 3",
    "a list": b"[1, 2]",
    "brackets without end": b"[" * 100_000,
    "no entry": b'{"step": 3}',
    "no step": b'{"loss": 3.0}',
    "a loss that is no number": json.dumps(update(3, loss=math.nan)).encode(),
    "a loss that is text": json.dumps(update(3, loss="low")).encode(),
    "a loss beyond floats": b'{"step": 3, "loss": 1' + b"0" * 400 + b"}",
    "a number of too many digits": b'{"step": 3, "loss": 1' + b"0" * 9000 + b"}",
    "an update that was": json.dumps(update(1)).encode(),
    "settings that are none": b'{"settings": 7}',
    "a truth for a step": b'{"step": true, "loss": 3.0}',
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_line_that_cannot_be_read_is_named_and_the_rest_is_shown(tmp_path, what):
    entries = [settings(), update(1), update(2), BROKEN[what], update(4), final(4, 1.5)]
    log = report.read_log(write_log(tmp_path / "run", entries) / "log.jsonl", "run")
    assert [row["step"] for row in log.updates] == [1, 2, 4] and log.final["bits"] == 1.5
    assert len(log.problems) == 1 and log.problems[0].startswith("Line 4 ")
    assert any("Line 4 is left out" in text for text in page_of(tmp_path / "run").text("/p"))


@pytest.mark.parametrize("mark, end", [(b"\xef\xbb\xbf", b"\n"), (b"", b"\r\n"), (b"\xef\xbb\xbf", b"\r\n")])
def test_a_log_that_went_through_an_editor_is_read_whole(tmp_path, mark, end):
    path = write_log(tmp_path / "run", [settings(), update(1), update(2), final(2, 1.5)]) / "log.jsonl"
    want = report.read_log(path, "run")
    path.write_bytes(mark + path.read_bytes().replace(b"\n", end))
    assert report.read_log(path, "run") == want and not want.problems


VALUES = (0, -1, 1e308, -1e308, 5e-324, 1e-300, 10**400, math.nan, math.inf, True, None, "x", "<b>", [], {}, [1, [2]])


def test_a_model_of_a_width_that_cannot_be_has_no_number_of_parameters():
    config = settings()["config"]
    assert report.count_parameters(config) == tinygpt.count_parameters(tinygpt.Config(**config))[0]
    for width in (10**30, 2**31 - 1, 25, 0, -24, "wide", None):
        assert report.count_parameters(config | {"width": width}) is None


def test_whatever_a_log_says_a_page_comes_out(tmp_path):
    rng = random.Random(1)
    for _ in range(60):
        folders = []
        for run in range(rng.choice((1, 2, 9))):
            entries = whole()[: rng.randrange(1, 27)]
            for entry in rng.choices(entries, k=rng.choice((1, 5, 20))):
                part = entry if "step" in entry or rng.random() < 0.1 else entry[rng.choice(("settings", "config"))]
                if isinstance(part, dict) and part:
                    part[rng.choice(list(part))] = rng.choice(VALUES)
            path = write_log(tmp_path / str(run), entries) / "log.jsonl"
            data = bytearray(path.read_bytes())
            for _ in range(rng.choice((0, 0, 3))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(json.dumps(settings()).encode() + b"\n" + data)
            folders.append(tmp_path / str(run))
        assert page_of(*folders).text("/h1")


def test_a_run_of_settings_alone_has_a_page(tmp_path):
    page = page_of(write_log(tmp_path / "begun", [settings()]))
    assert "a text" in page.text("/dd") and page.text("/p").count("The log has no such values.") >= 5


def test_checksums_of_data_are_in_no_table(tmp_path):
    runs = [write_log(tmp_path / f"run{n}", whole(seed=n, checksums={"t.bin": [str(n), [n]]})) for n in (1, 2)]
    for paths in (runs, runs[:1]):
        page = report.page(report.read_logs(paths))
        assert "checksums" not in page and "t.bin" not in page


def test_a_folder_of_runs_stands_for_all_of_them_the_best_first(tmp_path):
    for name, bits in (("a", 1.7), ("b", 1.2), ("c", 1.4)):
        write_log(tmp_path / "sweep" / name, whole(bits))
    write_log(tmp_path / "sweep" / "d", [settings(), update(1)])
    logs = report.read_logs([tmp_path / "sweep", tmp_path / "sweep" / "a"])
    assert [log.name for log in logs] == ["b", "c", "a", "d"]


def test_two_folders_of_one_name_are_told_apart(tmp_path):
    logs = report.read_logs([write_log(tmp_path / x / "run", whole()) for x in "ab"])
    assert len({log.name for log in logs}) == 2


# == 2  what runs reached ==============================================================================================


def test_published_bits_follow_from_nats_and_bytes_per_token():
    bytes_per_token = {"CS336": 4.117, "stories260K": 2.06, "stories": 3.77}
    checked = 0
    for p in report.PUBLISHED:
        if p.nats:
            size = next(size for start, size in bytes_per_token.items() if p.name.startswith(start))
            digits = len(str(p.bits).split(".")[1])
            assert abs(p.nats / math.log(2) / size - p.bits) < 0.6 * 10**-digits, p
            checked += 1
    assert checked == 9


def test_published_models_have_the_parameters_of_our_registry():
    sizes = {"CS336": "17m-cs336", "TinyStories-1M": "tinystories-1m"}
    sizes |= {f"stories{x}": x.lower() for x in ("260K", "15M", "42M", "110M")}
    for p in report.PUBLISHED:
        size = next(size for start, size in sizes.items() if p.name.startswith(start))
        assert p.parameters == tinygpt.count_parameters(tinygpt.find_size(size))[0], p


# == 3  plots ==========================================================================================================


def drawn(source, kind, title):
    """The points of the shapes of one kind in the figure of a title, read back into its units: [[(x, y)]]."""
    figure = next(x for x in source.split("<figure")[1:] if f"<figcaption>{title} " in x)
    x_axis, y_axis = (list(map(float, re.search(rf'data-{c}="([^"]*)"', figure).group(1).split())) for c in "xy")

    def value(t, axis):
        low, high, log = axis
        return low * (high / low) ** t if log else low + t * (high - low)

    shapes = re.findall(rf'class="r(\d+) {kind}"[^>]* (?:d|points)="([^"]*)"', figure)
    pairs = [(int(run), re.findall(r"(-?[\d.]+)[ ,](-?[\d.]+)", shape)) for run, shape in shapes]
    return {
        run: [(value(float(x) / 1000, x_axis), value(1 - float(y) / 1000, y_axis)) for x, y in points]
        for run, points in pairs
    }


def near(found, expected):
    assert len(found) == len(expected)
    for (x, y), (x_there, y_there) in zip(found, expected):
        assert x == pytest.approx(x_there, rel=2e-3, abs=0.1) and y == pytest.approx(y_there, rel=2e-3)


def test_the_points_of_a_plot_are_those_of_the_logs(tmp_path):
    first, second = whole(1.2), whole(1.6, lr=2e-3)
    logs = report.read_logs([write_log(tmp_path / "b", second), write_log(tmp_path / "a", first)])
    source = report.page(logs)
    for run, entries in enumerate((first, second)):
        near(drawn(source, "faint", "Loss")[run], [(e["tokens"], e["loss"]) for e in entries if "loss" in e])
        near(drawn(source, "line", "Learning rate")[run], [(e["step"], e["lr"]) for e in entries if "lr" in e])
        told = [e for e in entries if "val_nats" in e]
        near(drawn(source, "dots", "Loss")[run], [(64 * e["step"], e["val_nats"]) for e in told])
        bits = [(64 * e["step"], e["val_bits_per_byte"]) for e in told]
        near(drawn(source, "dots", "Validation beside others")[run], bits)
        near(drawn(source, "ring", "Validation beside others")[run], [(1280, entries[-1]["final_val_bits_per_byte"])])
        near(drawn(source, "dots", "lr")[run], [((1e-3, 2e-3)[run], (1.19, 1.59)[run])])


def test_every_published_figure_of_the_plot_is_a_level_line_at_its_height(tmp_path):
    source = report.page(report.read_logs([write_log(tmp_path / "run", whole())]))
    figure = next(x for x in source.split("<figure")[1:] if "<figcaption>Validation beside others " in x)
    low, high, _ = map(float, re.search(r'data-y="([^"]*)"', figure).group(1).split())
    for p in report.PUBLISHED:
        if p.drawn:
            top = float(re.search(rf'style="top:([\d.]+)%">{p.drawn} {p.bits:g}<', figure).group(1))
            assert low * (high / low) ** (1 - top / 100) == pytest.approx(p.bits, rel=2e-3)


def test_a_run_that_explodes_does_not_flatten_the_others(tmp_path):
    exploded = [settings(lr=9.0), update(1, 6.0), update(2, 8e9), update(3, 9e12)]
    logs = report.read_logs([write_log(tmp_path / "a", whole()), write_log(tmp_path / "b", exploded)])
    figure = report.page(logs).split("<figcaption>Loss ")[1]
    assert float(re.search(r'data-y="\S+ (\S+) 0"', figure).group(1)) < 8


@pytest.mark.parametrize("n", [1, 2, 3, 99, 1000, 20_000])
def test_smoothing_keeps_a_line_straight_and_is_a_mean(n):
    points = [(i, 3.0 + 2 * i) for i in range(n)]
    smoothed = report.smooth(points)
    reach = n // 100
    for x, y in smoothed:
        if reach <= x < n - reach:
            assert y == pytest.approx(3 + 2 * x)
    assert len(smoothed) <= report.POINTS + 1 and smoothed[0][0] == 0 and smoothed[-1][0] == n - 1


def test_a_spike_of_one_update_is_never_lost():
    points = [(i, 1.0) for i in range(50_000)]
    points[31_234], points[40_001] = (31_234, 77.0), (40_001, -5.0)
    kept = report.extremes(points)
    assert {(31_234, 77.0), (40_001, -5.0)} <= set(kept) and len(kept) <= 2 * report.POINTS and kept == sorted(kept)


@pytest.mark.parametrize("low, high", [(0, 1), (0.3, 0.30001), (-4, 1e9), (2.5, 9), (1e-6, 3e-6), (0.0, 27.0)])
def test_ticks_are_round_and_lie_in_their_axis(low, high):
    found = report.ticks(low, high, False)
    assert 3 <= len(found) <= 8 and low <= found[0] and found[-1] <= high * (1 + 1e-12)
    steps = [b - a for a, b in zip(found, found[1:])]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert f"{steps[0]:.0e}"[0] in "125"


@pytest.mark.parametrize("low, high", [(0.29, 2.1), (1e-4, 1e5), (3.0, 3.2), (64, 1024), (1e-12, 1e12)])
def test_logarithmic_ticks_lie_in_their_axis(low, high):
    found = report.ticks(low, high, True)
    assert 2 <= len(found) <= 9 and low <= found[0] and found[-1] <= high and found == sorted(set(found))


@pytest.mark.parametrize("x, text", [(0, "0"), (0.003, "0.003"), (512, "512"), (8192, "8192"), (40_000, "40k"),
                                     (2.5e6, "2.5M"), (9.8e9, "9.8B")])  # fmt: skip
def test_short_numbers(x, text):
    assert report.short(x) == text


# == 4  the page =======================================================================================================


def test_the_page_of_a_real_run_parses_and_says_its_figures(real):
    page, log = page_of(real), report.read_log(real / "log.jsonl", "tiny")
    r = report.result(log)
    shown = [f"{r['bits_per_byte']:.4f}", f"{r['nats_per_token']:.4f}", "12", report.short(r["tokens"])]
    shown += [f"{r['parameters']:,}", f"{r['tokens_per_second']:,}"]
    assert page.text("/strong")[: len(shown)] == shown
    told = "".join(page.text("/p") + page.text("/p/strong"))
    for v in log.validations:
        assert v["stories"][0].removeprefix("Lily") in told
    assert page.text("/pre") == [log.command]
    pairs = dict(zip(page.text("/dt"), page.text("/dd")))
    assert pairs["lr"] == f"{log.settings['lr']:g}" and pairs["width"] == "24" and pairs["steps"] == "12"


def test_the_table_of_runs_has_the_figures_of_the_logs_and_the_settings_that_differ(tmp_path):
    folders = [write_log(tmp_path / "slow", whole(1.6, lr=1e-3)), write_log(tmp_path / "fast", whole(1.2, lr=4e-3))]
    folders.append(write_log(tmp_path / "stopped", whole(1.4, lr=2e-3)[:12]))
    page = page_of(*folders)
    rows = page.cells()
    assert rows[0][:3] == ["run", "bits/byte", "lr"]
    parameters = f"{tinygpt.count_parameters(tinygpt.Config(300, 32, 24, 2, 3))[0]:,}"
    assert rows[1] == ["fast", "1.1900", "0.004", "2.3800", "20", "1,280", "32", parameters, "0.7 min", "finished"]
    assert rows[2] == ["slow", "1.5900", "0.001", "3.1800", "20", "1,280", "32", parameters, "0.7 min", "finished"]
    assert rows[3][:6] == ["stopped", "1.7750 *", "0.002", "3.5500", "10", "640"]
    assert rows[3][-1] == "at update 10 of 20"
    shaded = [attributes for tag, attributes in page.elements if tag == "th" and attributes.get("class") == "differs"]
    assert len(shaded) == 1
    assert "lr" not in page.text("/dt") and "seed" in page.text("/dt")


def test_a_run_stands_in_its_place_among_those_of_others(tmp_path):
    rows = page_of(write_log(tmp_path / "ours", whole(0.61))).cells()
    order = [row[4] for row in rows[1:]]
    assert order == sorted(order) and len(order) == len(report.PUBLISHED) + 1
    at = next(i for i, row in enumerate(rows) if row[0].startswith("ours"))
    assert rows[at][2:5] == ["1280", "1.2", "0.600"]
    assert rows[at - 1][0].startswith("CS336, 40.96M") and rows[at + 1][0].startswith("CS336, the course's laptop")


@pytest.mark.parametrize("count", [1, 2, 12])
def test_nothing_of_the_page_comes_from_a_network(tmp_path, count):
    source = report.page(report.read_logs([write_log(tmp_path / f"r{i}", whole(1 + i / 9)) for i in range(count)]))
    for tag, attributes in Page(source).elements:
        assert tag not in ("iframe", "object", "embed", "base", "form", "img", "image", "use")
        for name in ("src", "href", "srcset", "xlink:href", "action", "style"):
            value = attributes.get(name) or ""
            assert value == "data:," or not re.search(r"//|url\(|:\w*,", value), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|WebSocket|import\(", source)


def test_what_a_log_says_is_never_markup(tmp_path):
    entries = [
        settings(**{HOSTILE: HOSTILE, "data": HOSTILE, "prompts": [HOSTILE], "lr": HOSTILE, "size": {HOSTILE: 1}})
    ]
    entries[0] |= {"command": HOSTILE, "config": {HOSTILE: HOSTILE}}
    entries += [update(1), update(2), validation(2, 1.5, [HOSTILE + " ran", {"a": HOSTILE}]), final(2, 1.4)]
    odd = tmp_path / HOSTILE.replace("/", "\u2215")
    for folders in ([odd], [odd, tmp_path / "plain"]):
        write_log(odd, entries)
        write_log(tmp_path / "plain", [settings(lr=HOSTILE), *entries[1:]])
        page = page_of(*folders)
        tags = [tag for tag, _ in page.elements]
        assert tags.count("script") == tags.count("style") == tags.count("title") == 1 and "img" not in tags
        said = "".join(page.text())
        assert said.count(HOSTILE) >= 5 and any(HOSTILE in text for text in page.text("/pre"))
        assert any(text == " ran" for text in page.text("/p")) and HOSTILE in page.text("/p/strong")


def test_half_a_surrogate_pair_in_a_story_does_not_stop_the_page(tmp_path):
    write_log(tmp_path / "run", [settings(), update(1), b'{"step": 1, "val_nats": 2, "stories": ["a \\ud83d b"]}'])
    status, _, err = invoke(report.main, tmp_path / "run", "--out", tmp_path / "r.html")
    assert status == 0, err
    assert "a ? b" in (tmp_path / "r.html").read_text("utf-8")


def test_each_of_many_runs_has_a_colour_of_its_own_in_light_and_dark():
    for count in (1, 8, 9, 30):
        css = report.colours(count)
        for part in (css.split("@media")[0], css.split("@media")[1]):
            found = re.findall(r"\.r\d+\{color:([^}]*)\}", part)
            assert len(found) == len(set(found)) == count


# == 5  handing on =====================================================================================================


class Writer:
    """What tensorboardX.SummaryWriter is to us."""

    def __init__(self, folder, **rest):
        Writer.made = self
        self.folder, self.scalars, self.texts, self.closed = folder, [], [], False

    def add_scalar(self, name, x, step):
        self.scalars.append((name, step, x))

    def add_text(self, name, text, step):
        self.texts.append((name, step, text))

    def close(self):
        self.closed = True


def fake_wandb():
    run = SimpleNamespace(logged=[], config={}, finished=False)
    run.log = lambda values, step: run.logged.append((step, values))
    run.finish = lambda: setattr(run, "finished", True)

    def init(**words):
        run.words = words
        return run

    return SimpleNamespace(run_of_test=run, init=init, Table=lambda columns, data: (columns, data))


def expected_scalars(entries):
    rows = []
    for entry in entries:
        for field in ("loss", "lr", "norm"):
            rows += [(f"train/{field}", entry["step"], entry[field])] if field in entry else []
        rows += [("train/tokens", entry["step"], entry["tokens"])] if "loss" in entry else []
        for start, name in (("val", "validation"), ("final_val", "final")):
            if f"{start}_nats" in entry:
                rows.append((f"{name}/nats_per_token", entry["step"], entry[f"{start}_nats"]))
                rows.append((f"{name}/bits_per_byte", entry["step"], entry[f"{start}_bits_per_byte"]))
    return rows


def test_tensorboard_is_handed_every_figure_and_story(real, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Writer))
    status, _, err = invoke(report.main, "--tensorboard", real)
    assert status == 0 and "tensorboard --logdir" in err
    entries = read_log(real)
    assert Writer.made.scalars == expected_scalars(entries) and Writer.made.closed
    told = [(f"story/{i}", e["step"], x) for e in entries for i, x in enumerate(e.get("stories", ()))]
    assert told and [text for text in Writer.made.texts if text[0] != "settings"] == told
    assert Path(Writer.made.folder) == real / "tensorboard"


def test_wandb_is_handed_every_figure_story_and_setting(real, monkeypatch):
    fake = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert invoke(report.main, real, "--wandb")[0] == 0
    entries, run = read_log(real), fake.run_of_test
    logged = [(name, step, x) for step, values in run.logged for name, x in values.items() if name != "stories"]
    assert logged == expected_scalars(entries) and run.finished
    told = [values["stories"][1] for _, values in run.logged if "stories" in values]
    assert told == [[[story] for story in e["stories"]] for e in entries if "stories" in e]
    steps = [step for step, _ in run.logged]
    assert steps == sorted(steps) and run.words["name"] == "tiny"
    assert run.config["lr"] == entries[0]["settings"]["lr"] and run.config["width"] == 24


def grow(monkeypatch, path, pieces):
    """Put the next piece behind a log (or, a callable, change it) whenever somebody waits for more."""
    left = iter(pieces)

    def wait(seconds):
        piece = next(left)
        if callable(piece):
            return piece()
        with open(path, "ab") as file:
            file.write(piece)

    monkeypatch.setattr(report.time, "sleep", wait)


def test_a_log_is_followed_in_whatever_pieces_it_comes(tmp_path, monkeypatch):
    data = (write_log(tmp_path / "whole", whole()) / "log.jsonl").read_bytes()
    path = tmp_path / "log.jsonl"
    path.write_bytes(data[:7])
    grow(monkeypatch, path, [data[i : i + 41] for i in range(7, len(data), 41)])
    expected = list(report.entries(tmp_path / "whole" / "log.jsonl", live=False))
    assert [kind for kind, _ in expected].count("update") == 20 and expected[-1][0] == "final"
    assert list(report.entries(path, live=True)) == expected


def test_a_run_that_is_killed_and_goes_on_is_handed_on_once(tmp_path, monkeypatch):
    entries = [settings(), *(update(step) for step in range(1, 9)), final(8, 1.5)]
    lines = [json.dumps(entry).encode() + b"\n" for entry in entries]
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(lines[:7]) + lines[7][:9])  # killed in the middle of a line
    pieces = [lambda: path.write_bytes(b"".join(lines[:5])), b"".join(lines[5:8]), lines[8] + lines[9]]
    grow(monkeypatch, path, pieces)
    assert [entry for _, entry in report.entries(path, live=True)] == entries


def test_following_ends_neatly_on_ctrl_c(tmp_path, monkeypatch):
    write_log(tmp_path / "run", [settings(), update(1)])
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Writer))

    def leave():
        raise KeyboardInterrupt

    grow(monkeypatch, tmp_path / "run" / "log.jsonl", [json.dumps(update(2)).encode() + b"\n", leave])
    assert invoke(report.main, "--tensorboard", "--follow", tmp_path / "run")[0] == 130
    assert Writer.made.closed and [step for name, step, _ in Writer.made.scalars if name == "train/loss"] == [1, 2]


def test_tensorboard_reads_back_what_it_was_handed_also_the_second_time(real):
    pytest.importorskip("tensorboardX")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):
        assert invoke(report.main, "--tensorboard", real)[0] == 0
    events = accumulator.EventAccumulator(str(real / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    expected = expected_scalars(read_log(real))
    assert set(events.Tags()["scalars"]) == {name for name, _, _ in expected}
    for name in events.Tags()["scalars"]:
        found = [(e.step, e.value) for e in events.Scalars(name)]
        there = [(step, x) for other, step, x in expected if other == name]
        assert [step for step, _ in found] == [step for step, _ in there]
        assert [x for _, x in found] == pytest.approx([x for _, x in there], rel=1e-6)
    assert "story/0/text_summary" in events.Tags()["tensors"]


# == 6  command line ===================================================================================================


@pytest.mark.parametrize("words, said", [
    (["nothing-here"], "nothing-here holds no run; expected a folder with the log.jsonl"),
    (["empty"], "has no entry yet"),
    (["run", "--follow"], "add --tensorboard or --wandb"),
    (["run", "--tensorboard", "--out", "x.html"], "leave out --out"),
    (["run", "--tensorboard"], "pip install tensorboardX"),
    (["run", "--wandb"], "pip install wandb"),
    (["run", "other", "--wandb", "--follow"], "a single run; got 2"),
    (["run", "--out", "no/folder/r.html"], "No such file"),
    ([], "the following arguments are required: RUN"),
])  # fmt: skip
def test_a_mistake_ends_in_one_line(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    for module in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    write_log(tmp_path / "run", whole())
    write_log(tmp_path / "other", whole())
    write_log(tmp_path / "empty", [])
    assert said in refusal(report.main, "report.py", *words)
    assert not list(tmp_path.glob("*.html"))


def test_wandb_that_does_not_start_says_why(tmp_path, monkeypatch):
    fake = fake_wandb()

    def init(**words):
        raise RuntimeError("no API key")

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    write_log(tmp_path / "run", whole())
    assert "no API key" in refusal(report.main, "report.py", "--wandb", tmp_path / "run")


def test_the_command_writes_the_page_and_every_flag_has_a_help_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, err = invoke(report.main, write_log(tmp_path / "run", whole()))
    assert status == 0 and not out and err.startswith("report.html: ")
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "run" in page.text("/h1")
    with pytest.raises(SystemExit):
        report.main(["--help"])
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("--out FILE", "--tensorboard", "--wandb", "--follow"))
