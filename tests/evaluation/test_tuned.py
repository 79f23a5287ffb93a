"""What a comparison says of learning rates that were, or were not, tuned, on planted runs."""

from tests.evaluation.planted import plant
from vlmds.evaluation.compare import compare
from vlmds.evaluation.evaluated_runs import load_run
from vlmds.evaluation.report import write_report
from vlmds.evaluation.verdict import verdict_sentences


def record(align: float, finetune: float = 5e-5, *, share: float = 0.1, edge: bool = False) -> dict:
    """run.json's part of an experiment for which these rates were chosen."""

    def stage(name: str, base: float, chosen: float) -> dict:
        losses = {0.1: 2.0, 0.3: 1.5, 1.0: 1.25, 3.0: None}
        losses[round(chosen / base, 3)] = 1.0
        pilots = [{"factor": f, "lr": f * base, "loss": loss, "gpu_hours": 0.25} for f, loss in losses.items()]
        return {"stage": name, "base": base, "chosen": chosen, "edge": edge, "pilots": pilots}

    stages = [stage("align", 1e-3, align), stage("finetune", 5e-5, finetune)]
    return {"tuned": {"factors": [0.1, 0.3, 1.0, 3.0], "share": share, "stages": stages, "gpu_hours": 2.0}}


def compared(tmp_path, e3: dict | None, e7: dict | None, *rates: str) -> dict:
    runs = [load_run(plant(tmp_path / "e3", "e3", record=e3))]
    runs.append(load_run(plant(tmp_path / "e7", "e7", record=e7, overrides=rates)))
    found = compare(runs)
    write_report(tmp_path / "report.html", runs, found)
    return found


def test_untuned_experiments_carry_a_line_under_the_verdict(tmp_path):
    found = compared(tmp_path, None, None)
    (line,) = [said for said in verdict_sentences(found) if "learning rate" in said[0]]
    assert line[0].startswith("One learning rate for all experiments") and "학습률" in line[1]
    assert found["warnings"] == [] and 'id="tuning"' not in (tmp_path / "report.html").read_text()
    other = compared(tmp_path / "other", None, None, "stages.0.lr=0.0003")
    (line,) = [said for said in verdict_sentences(other) if "rates" in said[0]]
    assert line[0].startswith("The learning rates differ and were not tuned")


def test_tuned_experiments_may_differ_in_their_rates_and_show_cost_and_sensitivity(tmp_path):
    found = compared(tmp_path, record(1e-3), record(3e-4), "stages.0.lr=0.0003")
    assert found["warnings"] == []
    assert next(row for row in found["differences"] if row["key"] == "stages.0.lr")["expected"]
    (line,) = [said for said in verdict_sentences(found) if "earning rate" in said[0]]
    assert "--rates 0.1,0.3,1,3 --tune-share 10%" in line[0] and "4 GPU-hours" in line[0] and "4 GPU" in line[1]
    first, second = found["tuning"]["rows"]
    assert (first["gpu_hours"], second["gpu_hours"]) == (2.0, 2.0)
    align = first["stages"][0]
    assert (align["lower"], align["higher"], align["range"]) == (0.5, None, 1.0)
    assert (second["stages"][0]["lower"], second["stages"][0]["higher"]) == (1.0, 0.25)
    page = (tmp_path / "report.html").read_text()
    assert 'id="tuning"' in page and "+0.2500" in page and "발산" in page


def test_tuned_beside_untuned_and_other_budgets_are_read_first(tmp_path):
    found = compared(tmp_path / "a", record(1e-3), None)
    (warning,) = found["warnings"]
    assert "not tuned with the same budget" in warning["en"] and "e7: —" in warning["en"] and "e7: —" in warning["ko"]
    assert not [said for said in verdict_sentences(found) if "earning rate" in said[0]]
    assert "튜닝하지 않음" in (tmp_path / "a" / "report.html").read_text()
    found = compared(tmp_path / "b", record(1e-3), record(1e-3, share=0.2))
    assert "e7: --rates 0.1,0.3,1,3 --tune-share 20%" in found["warnings"][0]["en"]


def test_a_rate_at_the_end_of_those_tried_is_warned_of(tmp_path):
    found = compared(tmp_path, record(1e-3), record(1e-3, edge=True))
    assert [w["en"].split(",")[0] for w in found["warnings"]] == ["e7: the rate chosen for stage align", "e7: the rate chosen for stage finetune"]  # fmt: skip
    assert "시도한 범위의 끝" in found["warnings"][0]["ko"]
