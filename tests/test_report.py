"""Reports and comparisons: what they hold, of which run, and what they refuse."""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
import time

import numpy as np
import pytest
from run_logs import FINDINGS, HOSTILE, NAMES, train, write

import gradstat
from gradstat import ArgumentTypeError, ArgumentValueError, MissingPackageError, RunLogError, cli
from gradstat.diagnosis import Finding
from gradstat.report import reduce
from gradstat.report.summary import findings_of

for package in ("jinja2", "plotly"):
    pytest.importorskip(package)

INF, NAN = float("inf"), float("nan")

RUNS = {
    "usual": {},
    "hostile_names": {"names": [*HOSTILE, *NAMES]},
    "all_nan": {"value": NAN},
    "all_inf": {"value": INF},
    "all_zero": {"value": 0.0},
    "empty": {"steps": 0},
    "no_layers": {"steps": 0, "names": ()},
    "one_step": {"steps": 1},
    "nothing_more": {"extras": False, "findings": ()},
}


def page_data(html: str) -> dict:
    packed = re.search(r'id="figures">([^<]*)<', html)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", html.partition("<main")[2].partition('id="figures"')[0])


@pytest.fixture(params=RUNS)
def run_log(request, tmp_path):
    return write(tmp_path / "run.db", **RUNS[request.param])


def test_plotly_takes_every_figure(run_log):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for report in (gradstat.make_report(run_log), gradstat.compare_runs(run_log, run_log)):
        for figure in page_data(report.html)["figures"]:
            own = ("named",)
            data = [{k: v for k, v in t.items() if k not in own} for t in figure["data"]]
            layout = {
                key: {k: v for k, v in part.items() if k != "layers"}
                if isinstance(part, dict)
                else part
                for key, part in figure["layout"].items()
            }
            text = re.sub(r'"--[a-z]+"', '"#123456"', json.dumps([data, layout]))
            graph_objects.Figure(*json.loads(text))


def test_a_page_asks_for_nothing(run_log):
    html = gradstat.make_report(run_log).html
    before_scripts = html.partition('id="plotly"')[0]
    assert not re.search(r"<(script|img|link|iframe)[^>]+(src|href)=", before_scripts)
    assert "default-src 'none'" in html


def test_values_are_json(run_log):
    for report in (gradstat.make_report(run_log), gradstat.compare_runs(run_log, run_log)):
        json.dumps(report.to_dict(), allow_nan=False)
        assert str(report)


def test_key_numbers(tmp_path):
    run = write(tmp_path / "run.db")
    report = gradstat.make_report(run)
    summary = report.to_dict()["summary"]
    with gradstat.open_run(run) as log:
        steps = log.steps
    clipped = (steps["clip_coef"] < 1) & ~steps["skipped"]
    assert summary["name"] == "run.db"
    assert summary["status"] == "finished"
    assert (summary["steps"], summary["skipped"], summary["layers"]) == (60, 1, len(NAMES))
    assert summary["final_loss"] == pytest.approx(2 / 60**0.5)
    assert summary["clip_rate"] == pytest.approx(clipped.mean())
    assert summary["seconds"] == 59
    assert f"<dd>{summary['final_loss']:.4g}" in report.html


def test_findings_stand_first_and_symptoms_under_their_cause(tmp_path):
    report = gradstat.make_report(write(tmp_path / "run.db"))
    codes = [finding["code"] for finding in report.to_dict()["findings"]]
    assert codes == [finding.code for finding in FINDINGS]
    text = text_of(report.html)
    places = [text.index(words) for words in ("Findings<", "Saturated act", "Vanishing", ">Loss<")]
    assert places == sorted(places)
    symptoms = re.search(r'class="symptoms">(.*?)</div>\s*<details', text)[1]
    assert "Vanishing gradient" in symptoms
    for part in ("divide the inputs by 255", "share saturated", "0.97", "0.5", "Glorot and Bengio"):
        assert part in text


def test_findings_that_explain_each_other_are_both_shown():
    def finding(code: str, cause: str) -> tuple[int, Finding]:
        return 1, Finding(code, "warning", 0.7, "x", (), caused_by=cause)

    class Run:
        findings = (finding("a", "b"), finding("b", "a"), finding("c", "a"), finding("d", "gone"))

    roots = {told.finding.code: told.symptoms for told in findings_of(Run())}
    shown = [s.finding.code for symptoms in roots.values() for s in symptoms]
    assert sorted([*roots, *shown]) == ["a", "b", "c", "d"]


def test_names_and_texts_are_escaped(tmp_path):
    report = gradstat.make_report(write(tmp_path / "run.db", names=[*HOSTILE, *NAMES]))
    html = report.html
    assert "<script>window" not in html
    assert "<img" not in html.partition('id="plotly"')[0]
    assert "&lt;b&gt;one&lt;/b&gt;" in html
    assert html.count("</script>") == 3
    data = page_data(html)
    assert data["wide"][0] == "&lt;script&gt;window.hacked = 1&lt;/script&gt;"
    assert max(map(len, data["narrow"])) < 60
    assert "слой.重み.🙂.weight" in data["hover"]
    assert data["hover"][3].replace("<br>", "") == HOSTILE[3]
    assert "\u202e" not in html
    assert "\x1b" not in html


def test_missing_parts_say_how_to_get_them(tmp_path):
    text = text_of(gradstat.make_report(write(tmp_path / "a.db", extras=False)).html)
    for words in ("Updates were not recorded", "Activations were not recorded", "No histogram"):
        assert words in text
    assert "activations=True" in text
    empty = gradstat.make_report(write(tmp_path / "b.db", 0)).html
    assert page_data(empty)["figures"] == []
    assert "No step was recorded" in empty
    assert "observe(loss=loss)" in empty


def test_500_layers_and_1000_steps_are_small_and_soon_there(tmp_path):
    names = [f"blocks.{n // 4}.part.{n % 4}.weight" for n in range(500)]
    run = write(tmp_path / "run.db", 1000, names)
    start = time.process_time()
    html = gradstat.make_report(run).html
    assert time.process_time() - start < 5
    assert len(html.encode()) < 6e6


def test_5000_layers(tmp_path):
    names = [f"blocks.{n}.weight" for n in range(5000)]
    html = gradstat.make_report(write(tmp_path / "run.db", 3, names)).html
    assert len(html.encode()) < 6e6
    assert "500 of 5,000 layers" in html


# ---- where a report comes from and goes to ----------------------------------------------------


def test_of_a_monitor_with_its_log(tmp_path):
    optimizer = train(tmp_path / "run.db")
    report = optimizer.gradstat.report()
    assert report.to_dict()["summary"] | {"status": ""} == (
        gradstat.make_report(tmp_path / "run.db").to_dict()["summary"] | {"status": ""}
    )
    assert report.to_dict()["summary"]["steps"] == 30
    gradstat.detach(optimizer)


def test_of_a_monitor_without_a_log():
    optimizer = train(None)
    summary = optimizer.gradstat.report().to_dict()["summary"]
    assert (summary["steps"], summary["layers"], summary["status"]) == (30, 8, "running")
    assert summary["final_loss"] == pytest.approx(optimizer.gradstat.observed("loss")[-1].value)
    assert summary["final_norm"] == pytest.approx(optimizer.gradstat.total_norm)
    figures = page_data(optimizer.gradstat.report().html)["figures"]
    assert {figure["id"] for figure in figures} >= {"loss", "norm", "flow", "heat"}


def test_of_a_monitor_before_its_first_step():
    optimizer = train(None, 0)
    assert "No step was recorded" in optimizer.gradstat.report().html


def test_save_is_whole_or_not_at_all(tmp_path):
    run = write(tmp_path / "run.db", 2)
    report = gradstat.make_report(run)
    assert report.save(tmp_path / "a.html").read_text("utf-8") == report.html
    with pytest.raises(ArgumentValueError, match=r"path must not be the run log .*run\.html"):
        report.save(run)
    with pytest.raises(OSError, match="folder"):
        report.save(tmp_path / "folder" / "a.html")
    assert {path.name for path in tmp_path.glob("*html*")} == {"a.html"}
    assert report._repr_html_().startswith("<iframe srcdoc=")


def test_sources_that_are_none(tmp_path):
    with pytest.raises(ArgumentTypeError, match="source must be a run log, its path or a monitor"):
        gradstat.make_report(3)
    (tmp_path / "no.db").write_text("x" * 5000)
    with pytest.raises(RunLogError):
        gradstat.make_report(tmp_path / "no.db")


def test_without_plotly_only_the_page_is_missing(tmp_path, monkeypatch):
    report = gradstat.make_report(write(tmp_path / "run.db", 2))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'gradstat\[report\]'"):
        report.save(tmp_path / "a.html")
    assert report.to_dict()["summary"]["steps"] == 2


# ---- two runs ---------------------------------------------------------------------------------


def test_compare(tmp_path):
    a = write(tmp_path / "a.db", 40)
    b = write(tmp_path / "b.db", 60, [*NAMES[:-1], "new.bias"], findings=(), lr=0.1, seed=1)
    comparison = gradstat.compare_runs(a, b)
    values = comparison.to_dict()
    assert [summary["steps"] for summary in values["runs"]] == [40, 60]
    assert values["differences"]["optimizer.lr"] == ["0.001", "0.1"]
    assert [len(findings) for findings in values["findings"]] == [3, 0]
    text = text_of(comparison.html)
    assert "Only A has 1 layer" in text
    assert "Only B has 1 layer: new.bias" in text
    assert re.search(r"optimizer\.lr \* +0\.001 +0\.1", str(comparison))
    assert "Nothing was found wrong" in text
    assert {f["id"] for f in page_data(comparison.html)["figures"]} == {
        "loss", "norm", "flow", "updates",
    }  # fmt: skip


# ---- commands ---------------------------------------------------------------------------------


def test_report_command(tmp_path, capsys):
    run = write(tmp_path / "run.db", 3)
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run.html'}\n"
    assert (tmp_path / "run.html").stat().st_size > 1e6
    assert cli.main(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == gradstat.make_report(run).to_dict()
    assert cli.main(["report", str(tmp_path / "none.db")]) == 1
    assert "gradstat report: error: path must be that of a run log" in capsys.readouterr().err


def test_compare_command(tmp_path, capsys):
    a, b = write(tmp_path / "a.db", 3), write(tmp_path / "b.db", 4)
    assert cli.main(["compare", str(a), str(b)]) == 0
    assert capsys.readouterr().out == f"{gradstat.compare_runs(a, b)}\n"
    assert cli.main(["compare", str(a), str(b), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][1]["steps"] == 4
    assert cli.main(["compare", str(a), str(b), "-o", str(tmp_path / "c.html")]) == 0
    assert (tmp_path / "c.html").exists()


# ---- what is left out -------------------------------------------------------------------------


def test_thinned_lines_keep_their_extremes():
    values = np.random.default_rng(0).normal(size=100_001)
    values[[17, 50_000]] = 99.0, -99.0
    values[70_000:70_500] = NAN
    keep = reduce.kept_points(values)
    assert len(keep) <= reduce.MAX_POINTS
    assert {0, 17, 50_000, 100_000} <= set(keep.tolist())
    assert np.isnan(values[keep]).any()
    assert list(reduce.kept_points(values[:5])) == [0, 1, 2, 3, 4]


def test_heat_map_keeps_magnitudes_and_spikes():
    steps = np.arange(1, 20_001, 5)
    values = np.full((len(steps), 3), 1e-3)
    values[:, 1] = 0.0
    values[:, 2] = NAN
    values[1234, 0] = 1e6
    bad = np.zeros(values.shape, bool)
    bad[5, 1] = True
    heat = reduce.heat_map(steps, values, bad)
    assert heat.codes.shape[1] <= reduce.MAX_COLUMNS
    level = (heat.high - heat.low) / 253
    decoded = heat.low + (heat.codes[0].astype(float) - 1) * level
    assert sorted(set(decoded.round(3))) == [-3.0, 6.0]
    assert decoded[(steps[1234] - 1) // heat.step_width] == pytest.approx(6.0)
    assert set(heat.codes[1]) == {1, reduce.NONFINITE}
    assert set(heat.codes[2]) == {reduce.MISSING}


def test_steps_that_are_not_recorded_leave_gaps_in_the_heat_map():
    heat = reduce.heat_map(np.array([10, 20, 30, 60]), np.ones((4, 1)), np.zeros((4, 1), bool))
    assert (heat.codes[0] == reduce.MISSING).tolist() == [False, False, False, True, True, False]
    assert (heat.first_step, heat.step_width) == (10, 10)
