"""`qlora plan`: from config.json alone, in a moment, and right beside the traced step."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shapes import CONFIGS

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import bench_plan
import gpu_plan

from qlora import cli, configfile, plansheet, speed
from qlora.cards import GIB, Card, named_card
from qlora.errors import DoesNotFit, ModelError
from qlora.memory import plan, require_fit
from qlora.recipe import recipe_from
from qlora.shape import Shape

LLAMA = CONFIGS["meta-llama/Llama-3.1-8B-Instruct"] | {"max_position_embeddings": 131072}
NOVEL = {
    "model_type": "stablelm", "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}  # fmt: skip
MEASUREMENTS = Path(__file__).parent / "measurements"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe for an 8B of which only the configuration is there."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "llama", LLAMA)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "mine.yaml").write_text(
        "model: {name: ./llama}\ndata: {train: rows.jsonl, max_length: 2048}\n"
    )
    return tmp_path


def write_config(folder: Path, values: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.fixture
def say(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qlora", "plan", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        code = end.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


Say = Callable[..., tuple[int, str, str]]


def test_a_plan_lists_bytes_term_by_term_a_verdict_and_what_else_would_fit(say: Say) -> None:
    code, out, err = say("mine.yaml", "--card", "rtx3060")
    assert (code, err) == (0, "")
    for words in (
        "(8.03 B) on RTX 3060: 11.64 GiB free", "base in NF4", "quantization state",
        "embeddings, head, norms", "adapters, fp32", "their gradients", "optimizer state",
        "kept activations", "one layer at work", "CUDA context, slack", "fits: 4.32 GiB to spare",
        "fused layers: 32 of 32 compute everything again",
        "GFLOP a token; no time is predicted: no run of five steps here has measured this card",
    ):  # fmt: skip
        assert words in out
    sizes = [float(size) for size in re.findall(r"(?m)^  \D.*? (\d+\.\d{3})", out)]
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.006)
    reach = re.search(r"max_length to ([\d,]+), or (\d+) x 2,048", out)
    assert reach is not None and int(reach[1].replace(",", "")) > 8192 and int(reach[2]) > 2


def test_the_quick_plan_needs_neither_torch_nor_transformers(folder: Path) -> None:
    code = (
        "import sys; sys.argv = ['qlora', 'plan', 'mine.yaml', '--card', 't4', '--json']\n"
        "from qlora import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print({'torch', 'transformers', 'datasets', 'rich'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"] is True
    assert done.stderr.strip() == "set()"


def test_a_plan_in_json_holds_all_that_is_printed(say: Say) -> None:
    code, out, _ = say("mine.yaml", "--card", "12GB", "--json", "train.fit=auto")
    found = json.loads(out)
    assert code == 0 and found["fits"] and found["refusal"] is None and found["traced"] is None
    assert found["total_bytes"] == sum(found["terms"].values())
    assert sum(found["chosen"]["levels"]) == 32 and len(set(found["chosen"]["levels"])) > 2
    assert found["longest_max_length"] >= 2048 and found["largest_micro_batch"] >= 1
    assert found["gflop_per_token"] > 32 and found["predicted_tokens_per_second"] is None


def test_what_does_not_fit_exits_with_2_and_says_the_cheapest_changes(say: Say) -> None:
    code, out, _ = say("mine.yaml", "--card", "8GB", "data.max_length=8192")
    assert code == 2
    assert "does not fit: 1.7" in out and "GiB too much" in out
    assert "Cheapest ways down:" in out and "train.activation_offload" in out
    assert "train.embedding_offload" in out and "train.mlp_tile" in out and "quant.head" in out


def test_what_no_setting_can_mend_names_the_largest_sibling_that_would_fit(say: Say) -> None:
    code, out, _ = say("mine.yaml", "--card", "4GB")
    assert code == 2
    assert "The largest sibling that would fit: meta-llama/Llama-3.2-3B." in out
    assert "max_length to 0" not in out


def test_a_longest_sequence_is_never_longer_than_the_base_knows(folder: Path, say: Say) -> None:
    write_config(folder / "llama", LLAMA | {"max_position_embeddings": 4096})
    assert "max_length to 4,096" in say("mine.yaml", "--card", "24GB")[1]
    code, out, err = say("mine.yaml", "--card", "24GB", "data.max_length=8192")
    assert (code, out) == (2, "") and "has 4,096 positions. Write data.max_length=4096" in err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantized as 'gptq'; only bitsandbytes",
        ),
        ({"num_experts": 8, "model_type": "qwen3_moe"}, "is a mixture of 8 experts"),
    ],
)
def test_what_a_run_would_refuse_is_no_plan(
    folder: Path, say: Say, changes: dict[str, Any], said: str
) -> None:
    write_config(folder / "llama", LLAMA | changes)
    code, out, err = say("mine.yaml", "--card", "80GB")
    assert (code, out) == (2, "") and said in err


def test_a_refusal_under_auto_shows_the_plan_that_was_refused(say: Say) -> None:
    more = ("train.fit=auto", "train.per_device_train_batch_size=8")
    code, out, _ = say("mine.yaml", "--card", "4GB", *more)
    assert code == 2
    assert "1 x 2,048 tokens a pass" in out and "inputs offloaded" in out
    total = re.search(r"total +([\d.]+) GiB", out)
    assert total is not None and float(total[1]) < 7.5


def test_a_configuration_that_leaves_keys_to_defaults_is_read_through_the_library(
    folder: Path, say: Say
) -> None:
    short = {k: v for k, v in LLAMA.items() if k not in ("num_attention_heads", "vocab_size")}
    write_config(folder / "llama", short | {"model_type": "mistral"})
    with pytest.raises(ModelError, match="'num_attention_heads' must be a positive whole number"):
        Shape.from_config(short)
    code, out, err = say("mine.yaml", "--card", "24GB")
    assert (code, err) == (0, "") and "(7.24 B)" in out  # 32 heads, 32,000 tokens


def test_a_text_that_is_no_configuration_of_a_language_model_is_refused(
    folder: Path, say: Say
) -> None:
    write_config(folder / "llama", {"model_type": "llama", "hidden_size": 250})
    code, out, err = say("mine.yaml", "--card", "24GB")
    assert (code, out) == (2, "") and err.startswith("qlora: model.name is")


def test_a_measured_card_gets_a_speed_and_a_time(say: Say, folder: Path) -> None:
    shape = Shape.from_config(LLAMA)
    recipe = recipe_from(
        {
            "model": {"name": "./llama"},
            "data": {"train": "rows.jsonl", "max_length": 2048},
            "run": {"name": "x"},
        }
    )
    driver = Card("Tesla T4", "cuda", 15 * GIB, 15 * GIB, (7, 5))  # as the driver names it
    speed.remember(driver, "float16", recipe, shape, 500.0, "2026-01-02")
    code, out, _ = say("mine.yaml", "--card", "t4")
    assert code == 0
    assert "about 500 tokens/s, 66 s a step of full rows (predicted from" in out
    assert "on 2026-01-02: 500 tokens/s)" in out
    small = Shape.from_config(
        CONFIGS["TinyLlama/TinyLlama-1.1B-Chat-v1.0"] | {"num_hidden_layers": 1}
    )
    speed.remember(driver, "float16", recipe, small, 500.0, "2026-01-02")
    assert "; a rough guess: that model is" in say("mine.yaml", "--card", "t4")[1]


def test_the_exact_plan_stands_beside_the_quick_one(folder: Path, say: Say) -> None:
    write_config(folder / "llama", LLAMA | {"num_hidden_layers": 4})
    code, out, _ = say("mine.yaml", "--card", "12GB", "--exact")
    assert code == 0 and "predicted" in out and "traced" in out
    (total,) = re.findall(r"total +([\d.]+) +([\d.]+) GiB", out)
    assert float(total[0]) == pytest.approx(float(total[1]), rel=0.03)


def test_a_family_that_the_quick_plan_does_not_know_is_traced(folder: Path, say: Say) -> None:
    write_config(folder / "llama", NOVEL)
    code, out, err = say("mine.yaml", "--card", "12GB")
    assert (code, err) == (0, "")
    assert "its step is traced: 'stablelm' is no family that the quick plan knows" in out
    assert "to spare (traced)" in out and "counted as if" not in out
    auto = say("mine.yaml", "--card", "12GB", "train.fit=auto")[1]
    assert "so train.fit: auto chooses nothing, and the recipe runs as it is written" in auto
    found = json.loads(say("mine.yaml", "--card", "12GB", "--json")[1])
    assert found["terms"]["base_nf4"] > 0 and found["terms"]["scales"] > 0
    assert found["total_bytes"] == sum(found["terms"].values())
    code, out, _ = say("mine.yaml", "--card", "0.8GiB")
    assert code == 2 and "does not fit" in out


def test_a_family_that_nobody_knows_is_refused(folder: Path, say: Say) -> None:
    write_config(folder / "llama", LLAMA | {"model_type": "novel"})
    code, out, err = say("mine.yaml", "--card", "12GB")
    assert (code, out) == (2, "")
    assert "of the family 'novel'" in err and "does not know" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("mine.yaml", "--card", "rtx4091"), "not a card known here. Did you mean RTX 4090"),
        ((), "Name a recipe, or write --table alone"),
        (("mine.yaml", "--table"), "Name a recipe, or write --table alone"),
        (("--table", "--card", "t4"), "Name a recipe, or write --table alone"),
        (("mine.yaml", "--card", "a100"), "Did you mean A100-40GB, A100-80GB?"),
        (("mine.yaml", "--card", "t4", "quant.compute_dtype=bfloat16"), "does not compute in"),
        (("mine.yaml", "--card", "t4", "lora.target_modules=[w1]"), "w1 matches nothing"),
        (("mine.yaml", "--card", "t4", "model.name=owner/model"), "not in the local hub cache"),
        (
            ("mine.yaml", "--card", "t4", "model.attn_implementation=flash_attention_2"),
            "which needs a card of capability 8 or newer; this is T4",
        ),
    ],
)
def test_bad_input_gets_a_short_message_and_exit_code_2(
    say: Say, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = say(*words)
    assert (code, out) == (2, "")
    assert said in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no config.json in it"),
        ("{", "whose config.json cannot be read"),
        ("[1]", "holds no JSON object"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_refused(
    folder: Path, content: str | None, said: str
) -> None:
    path = folder / "llama" / "config.json"
    path.unlink() if content is None else path.write_text(content)
    recipe = recipe_from(
        {"model": {"name": "./llama"}, "data": {"train": "rows.jsonl"}, "run": {"name": "x"}}
    )
    with pytest.raises(ModelError, match=said):
        configfile.read(recipe)


def test_the_table_has_a_row_for_every_model_and_a_column_for_every_card(say: Say) -> None:
    code, out, _ = say("--table")
    heading, _, columns, *rows = out.splitlines()
    assert code == 0 and "(predicted)" in heading
    assert columns.split() == ["model", *plansheet.CARDS]
    cells = {row.split()[0]: re.split(r" {2,}", row)[1:] for row in rows}
    assert cells["Llama-2-13b-hf"][0] == "-"
    assert cells["Llama-2-13b-hf"][3].endswith("to 4,096")  # more it does not know
    assert cells["Llama-3.1-8B"][1].startswith("6.8/7.3/9.6 to ")


def test_memory_that_others_hold_is_said() -> None:
    shared = Card("RTX 3060", "cuda", int(11.6 * GIB), int(5.1 * GIB), (8, 6))
    recipe = recipe_from(
        {"model": {"name": "a/b"}, "data": {"train": "hub:a/b"}, "run": {"name": "x"}}
    )
    with pytest.raises(DoesNotFit) as caught:
        require_fit(plan(recipe, Shape.from_config(LLAMA), shared))
    first = str(caught.value).splitlines()[0]
    assert "has 5.1 GiB free. 6.5 GiB of its 11.6 GiB are taken, by other processes." in first


def test_a_refusal_never_hides_the_numbers(say: Say) -> None:
    code, out, _ = say("mine.yaml", "--card", "8GB", "data.max_length=8192", "--json")
    found = json.loads(out)
    assert code == 2 and found["fits"] is False
    assert "This recipe needs" in found["refusal"] and found["total_bytes"] > 8 * GIB


# The grid that scripts/bench_plan.py traced


def _grid() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MEASUREMENTS / "plan-grid.json").read_text())
    return found


def test_the_grid_covers_families_sizes_lengths_ranks_checkpointing_and_vocabularies() -> None:
    cells = _grid()["cells"]
    for key, least in (
        ("family", 6), ("length", 3), ("r", 2), ("vocabulary", 2), ("checkpointing", 2),
    ):  # fmt: skip
        assert len({cell[key] for cell in cells}) >= least
    per_family = {cell["family"]: set() for cell in cells}
    for cell in cells:
        per_family[cell["family"]].add(cell["hidden"])
    assert all(len(sizes) == 3 for sizes in per_family.values())
    ways = [(cell["checkpointing"], cell["level"]) for cell in cells]
    assert set(ways) == set(bench_plan.WAYS)
    assert len(cells) == len(per_family) * 3 * 3 * 2 * 2 * len(bench_plan.WAYS)


def test_todays_quick_plan_is_within_three_percent_of_every_traced_cell() -> None:
    off = [
        cell
        for cell in map(bench_plan.judged, _grid()["cells"])
        if abs(cell["quick_by_traced"] - 1) > 0.03
    ]
    assert not off


def test_the_plan_is_what_cards_have_measured() -> None:
    found = gpu_plan.measured_files(MEASUREMENTS)
    if not found:
        pytest.skip("no card has run plan-by-measured of scripts/gpu_suite.py yet")
    for one in found:
        for cell in one["checks"]["plan-by-measured"]["measured"]["cells"]:
            config = gpu_plan.config_of(cell["model"])
            recipe = gpu_plan.recipe_of(cell["length"], activation_checkpointing=cell["recomputed"])
            card = Card(**one["card"] | {"capability": tuple(one["card"]["capability"])})
            today = plan(recipe, Shape.from_config(config.to_dict()), card)
            planned = sum(size for term, size in today.terms.items() if term != "overhead")
            assert planned == pytest.approx(cell["allocated_bytes"], rel=0.03), cell


@pytest.mark.parametrize("again", [True, 2, False])
@pytest.mark.parametrize("name", bench_plan.VARIATIONS)
def test_beside_the_grid_each_setting_is_planned_as_it_is_traced(name: str, again: Any) -> None:
    if name == "offload" and again is not True:
        pytest.skip("offloading is for layers that are all computed again")
    ratio = bench_plan.variation(name, 1024, again, layers=4)
    assert 0.97 <= ratio <= 1.045  # what is over is on the safe side


@pytest.mark.parametrize("level", [1, 2, 5])
@pytest.mark.parametrize("name", [*bench_plan.VARIATIONS, *bench_plan.FUSED_VARIATIONS])
def test_beside_the_grid_fused_layers_are_planned_as_they_are_traced(name: str, level: int) -> None:
    if name in bench_plan.OFFLOADS and level != 5:
        pytest.skip("offloading is for layers that are all computed again")
    if name == "tiles" and level == 1:
        pytest.skip("a layer that keeps gate and up is not computed in tiles")
    ratio = bench_plan.variation(name, 1024, True, layers=4, level=level)
    assert 0.97 <= ratio <= 1.045


@pytest.mark.parametrize("level", [1, 3, 5])
def test_gemma_2_is_planned_with_its_scores_when_its_layers_are_fused(level: int) -> None:
    ratio = bench_plan.variation("", 2048, True, layers=4, family="gemma2", level=level)
    assert ratio == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("length", [512, 4096])
def test_gemma_2_is_planned_with_the_scores_that_its_attention_keeps(length: int) -> None:
    assert bench_plan.variation("", length, True, layers=4, family="gemma2") == pytest.approx(
        1.0, abs=0.03
    )


def test_the_reach_of_auto_is_that_of_settings_chosen_anew(say: Say) -> None:
    written = say("mine.yaml", "--card", "t4")[1]
    chosen = say("mine.yaml", "--card", "t4", "train.fit=auto")[1]
    reach = [
        int(re.search(r"max_length to ([\d,]+)", out)[1].replace(",", ""))
        for out in (written, chosen)
    ]
    assert "chosen anew for each length" in chosen
    assert reach[1] >= reach[0] > 10_000
    assert say("mine.yaml", "--card", "t4", "train.fit=auto", f"data.max_length={reach[1]}")[0] == 0
    assert (
        say("mine.yaml", "--card", "t4", "train.fit=auto", f"data.max_length={reach[1] + 64}")[0]
        == 2
    )


def test_a_published_base_is_planned_where_its_file_is_out_of_reach(
    say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, _ = say("qwen3-8b-8gb", "--card", "8GB")
    assert code == 0 and "Qwen/Qwen3-8B (8.19 B) on 8 GB card" in out
    assert "note: planned with the published shape of Qwen/Qwen3-8B: model.name is" in out
    code, out, err = say("qwen3-8b-8gb", "--card", "80GB", "data.max_length=65536")
    assert (code, out) == (2, "") and "has 40,960 positions" in err
    assert say("llama-3.1-8b-12gb", "--card", "12GB")[0] == 0  # the instruction-tuned twin


def test_a_plan_in_a_notebook_takes_a_name_and_shows_itself(folder: Path) -> None:
    import qlora

    sheet = qlora.plan("quickstart", "t4")
    assert repr(sheet) == str(sheet)
    assert "embedded:base (3.5 M) on T4" in repr(sheet)
    assert qlora.plan(folder / "mine.yaml", named_card("t4")).fits
