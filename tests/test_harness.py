"""EleutherAI's harness on a loaded model: its own figures, no second load, no resized embedding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import BASE
from fused_models import bare, make
from transformers import AutoTokenizer

from qlora import adapter
from qlora.errors import DataError, RecipeError
from qlora.evaluation import harness

pytest.importorskip("lm_eval", reason="needs the extra qlora[eval]")
pytestmark = pytest.mark.usefixtures("one_thread")
CHOICES = [
    {"question": f"What is {a} plus {b}?", "choices": [f"{a + b}", f"{a + b + 3}"], "answer": 0}
    for a in range(4)
    for b in range(3)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two tasks over a local file: one of likelihoods, one of answers; and one whose data is on the hub."""
    where = tmp_path_factory.mktemp("tasks")
    file = where / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    local = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\n"
    texts = 'doc_to_text: "{{question}}"\n'
    (where / "sums.yaml").write_text(
        f"task: our_sums\n{local}{texts}test_split: test\noutput_type: multiple_choice\n"
        'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (where / "answers.yaml").write_text(
        f"task: our_answers\n{local}{texts}test_split: test\noutput_type: generate_until\n"
        'doc_to_target: "{{choices[0]}}"\ngeneration_kwargs:\n  until: ["."]\n  max_gen_toks: 4\n'
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (where / "far.yaml").write_text(
        f"task: our_far\ndataset_path: nobody/nothing-of-the-kind\n{texts}test_split: test\n"
        "output_type: multiple_choice\ndoc_to_choice: [a, b]\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n"
    )
    return where


@pytest.fixture(autouse=True)
def _own_data_cache(monkeypatch, tmp_path_factory):
    import datasets

    where = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(where))


@pytest.fixture(scope="module")
def tok():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model():
    """Its embedding has more rows than the tokenizer has tokens, as Qwen's has."""
    return make("llama", changes={"vocab_size": 2112}).eval()


def likelihoods(model, tok, question: str, choices: list[str]) -> list[float]:
    """The reference: log-likelihoods of " answer" after the question, by hand."""
    found = []
    asked = tok(question)["input_ids"]
    for choice in choices:
        ids = tok(f"{question} {choice}")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        found.append(sum(float(logits[at - 1, ids[at]]) for at in range(len(asked), len(ids))))
    return found


def test_the_scores_are_those_of_the_model_that_was_handed_over(folder, model, tok):
    found = harness.find(["our_sums"], folder).run(model, tok)
    (score,) = found
    expected = [
        float(
            max(range(2), key=likelihoods(model, tok, row["question"], row["choices"]).__getitem__)
            == 0
        )
        for row in CHOICES
    ]
    assert (score.task, score.metric, score.higher_is_better) == ("our_sums", "acc", True)
    assert list(score.rows) == expected
    assert score.value == pytest.approx(sum(expected) / len(expected))
    assert model.get_input_embeddings().weight.shape[0] == 2112


def test_with_the_adapter_off_it_is_the_base_that_answers(folder, tok):
    model = make("llama", changes={"vocab_size": 2112}).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 2.0)
    found = harness.find(["our_sums"], folder)
    tuned = found.run(model, tok)
    with adapter.disabled(model):
        base = found.run(model, tok)
        expected = [
            float(
                max(
                    range(2),
                    key=likelihoods(model, tok, row["question"], row["choices"]).__getitem__,
                )
                == 0
            )
            for row in CHOICES
        ]
    assert list(base[0].rows) == expected != list(tuned[0].rows)


def test_a_model_without_an_adapter_is_taken_too_and_its_mode_is_kept(folder, tok):
    base = bare("llama", vocab_size=2048).train()
    found = harness.find(["our_answers"], folder).run(base, tok, limit=5)
    assert [(one.task, one.metric, len(one.rows)) for one in found] == [
        ("our_answers", "exact_match", 5)
    ]
    assert base.training


def test_questions_go_through_the_chat_template_only_when_asked(folder, model, tok, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    asked: list[str] = []
    own = HFLM.generate_until

    def watched(self, requests, **options):
        asked.extend(request.args[0] for request in requests)
        return own(self, requests, **options)

    monkeypatch.setattr(HFLM, "generate_until", watched)
    found = harness.find(["our_answers"], folder)
    found.run(model, tok, limit=1)
    found.run(model, tok, limit=1, chat=True)
    question = CHOICES[0]["question"]
    template = tok.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    assert asked == [question, template] and template != question


def test_what_the_harness_remarks_on_how_it_is_called_is_not_shown(folder, model, tok, capfd):
    harness.find(["our_sums"], folder).run(model, tok, limit=1)
    said = capfd.readouterr()
    assert "not of type `str`" not in said.err + said.out


def test_a_task_of_the_harness_itself_is_known_without_a_folder():
    assert harness.find(["arc_easy"]).tasks == ("arc_easy",)


def test_a_task_that_does_not_exist_is_told_with_its_neighbours(folder):
    with pytest.raises(
        RecipeError, match=r"the harness knows no task 'arc_eazy'\. Did you mean arc_easy"
    ):
        harness.find(["arc_eazy"])
    with pytest.raises(
        RecipeError, match=r"no task 'my_sums'.* are: our_answers, our_far, our_sums"
    ):
        harness.find(["our_sums", "my_sums"], folder)
    with pytest.raises(RecipeError, match=r"--lm-eval names no task"):
        harness.find([])


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"--lm-eval-path is '.*none', which is no folder"):
        harness.find(["our_sums"], tmp_path / "none")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        RecipeError, match=r"not installed. Install it with `pip install 'qlora\[eval\]'`"
    ):
        harness.find(["arc_easy"])


def test_a_task_whose_data_is_on_a_hub_out_of_reach_says_so(folder, model, tok):
    with pytest.raises(DataError) as error:
        harness.find(["our_far"], folder).run(model, tok)
    said = str(error.value)
    assert said.startswith("--lm-eval our_far: a data set of these tasks cannot be read")
    assert "HF_HUB_OFFLINE forbids asking the hub" in said and "--lm-eval-path DIR" in said
