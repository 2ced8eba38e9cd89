"""Many questions to one model at once: each gets what it would get alone, whoever comes and goes."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import BASE
from families import EVERY, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    TopPLogitsWarper,
)

from qlora import adapter, engine, loader, tokenizer
from qlora.engine import Busy, Closed, Engine, Question, slots
from qlora.engine.slots import Slots
from qlora.engine.spelling import Spelling
from qlora.engine.stacked import Stacked
from qlora.errors import CheckpointError, ModelError
from qlora.generation import Sampling
from qlora.recipe import recipe_from

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = "embedded:tickets/train.jsonl"  # a recipe names some; nothing is trained here
ADAPTERS = ("red", "green", "blue", "grey")
TEXTS = (
    "A parcel that never came", "The box", "My keyboard lacks a key, and I was billed twice for it. Help.",
    "What is two plus two?", "Once upon a time there was",
)  # fmt: skip
LENGTH = 14


def generated(model, tok, prompt, length=LENGTH):
    """transformers' own greedy answer, one row at a time."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=length, pad_token_id=tok.pad_token_id,
        eos_token_id=tokenizer.stop_ids(tok, model.generation_config),
    )  # fmt: skip
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
    return tuple(out[0, len(prompt) :].tolist())


class House:
    """The embedded base as NF4, four adapters, and what peft and transformers say to each prompt."""

    def __init__(self):
        recipe = recipe_from(
            {
                "model": {"name": "embedded:base"}, "data": {"train": ROWS}, "lora": {"r": 4},
                "quant": {"cache": False}, "train": {"activation_checkpointing": False},
                "run": {"name": "engine"},
            }
        )  # fmt: skip
        from qlora.cards import Card

        card = Card("CPU", "cpu", 2**34, 2**34)
        self.recipe, self.tok = recipe, AutoTokenizer.from_pretrained(BASE)
        base = loader.load_base(recipe, card, loader.read_config(recipe), bars=False).model
        self.prompts = [tuple(self.tok(text)["input_ids"]) for text in TEXTS]
        self.said = {(None, p): generated(base, self.tok, p) for p in self.prompts}
        self.matrices = {}
        for number, name in enumerate(ADAPTERS):
            on = adapter.attach(base, recipe).eval()
            noise = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for key, weight in on.named_parameters():
                    if ".lora_B." in key:
                        weight.copy_(torch.randn(weight.shape, generator=noise) * 0.05)
            self.said |= {(name, p): generated(on, self.tok, p) for p in self.prompts}
            base, self.matrices[name] = adapter.take_off(on, "default", name)
        self.base = base
        self.stacked = Stacked(base, self.matrices)

    def engine(self, **limits):
        return Engine(self.base, self.tok, self.stacked, **limits)

    def question(self, name, prompt, length=LENGTH, **more):
        return Question(prompt, name, Sampling(max_new_tokens=length), **more)


@pytest.fixture(scope="module")
def house(one_thread):
    return House()


@pytest.fixture
def running(house):
    made = []

    def start(**limits):
        made.append(house.engine(**limits).start())
        return made[-1]

    yield start
    for one in made:
        one.close(wait=False)


class Ear:
    """Hears one answer, from the engine's thread."""

    def __init__(self):
        self.pieces, self.ending, self.ended = [], None, threading.Event()
        self.began = threading.Event()

    def __call__(self, piece, ending):
        self.pieces.append(piece)
        self.began.set()
        if ending is not None:
            self.ending = ending
            self.ended.set()

    def wait(self):
        assert self.ended.wait(30)
        return self.ending


# --- the same answer in any company


def test_the_adapters_of_these_tests_say_different_things(house):
    names = (None, *ADAPTERS)
    found = [len({house.said[name, prompt] for name in names}) for prompt in house.prompts]
    assert sorted(found)[1:] == [5, 5, 5, 5]  # one prompt may be answered by nothing


def test_eight_threads_over_four_adapters_and_the_base_hear_what_peft_alone_says(house, running):
    served = running(slots=8, waiting=100)
    jobs = [(name, p) for name in (None, *ADAPTERS) for p in house.prompts]
    random.Random(1).shuffle(jobs)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: served.answer(house.question(*job)), jobs))
    assert [ending.tokens for _, ending in found] == [house.said[job] for job in jobs]
    assert max(served.steps) == 8  # they were together
    stops = set(tokenizer.stop_ids(house.tok, house.base.generation_config))
    for text, ending in found:
        spoken = [token for token in ending.tokens if token not in stops]
        assert text == house.tok.decode(spoken, skip_special_tokens=True)
        assert ending.reason == ("stop" if ending.tokens[-1] in stops else "length")


def test_a_row_has_the_same_bits_alone_and_in_company_in_any_place(house):
    def follow(rows, watched):
        table = Slots(house.base, house.stacked, 8)
        for slot, name, prompt in rows:
            table.fill(slot, prompt, name)
        return [table.step([7 + n] * 8)[watched] for n in range(4)]

    a, b, c = house.prompts[:3]
    alone = follow([(0, "red", a)], 0)
    crowded = [(0, "red", a), *((s, ADAPTERS[s % 4], (a, b, c)[s % 3]) for s in range(1, 8))]
    moved = [(6, "red", a), (0, None, c), (1, "blue", b)]
    for other in (follow(crowded, 0), follow(moved, 6)):
        assert all(torch.equal(x, y) for x, y in zip(alone, other, strict=True))


def test_who_comes_and_goes_and_whose_keys_grow_changes_nothing(house, running):
    long = tuple((house.prompts[2] * 6)[:90])  # its keys need wider rows than the others'
    jobs = [(ADAPTERS[n % 4], (*house.prompts, long)[n % 6], 2 + n % 7) for n in range(24)]
    single = running(slots=3, waiting=0)
    alone = [single.answer(house.question(*job))[1].tokens for job in jobs]
    assert set(single.steps) == {1}
    crowd = running(slots=3, waiting=50)
    ears = [Ear() for _ in jobs]
    crowd.ask([house.question(*job) for job in jobs], ears)
    assert [ear.wait().tokens for ear in ears] == alone
    assert crowd.steps[3] > crowd.steps.get(1, 0)
    for name, prompt, length in jobs[:6]:
        if prompt in house.prompts:
            assert house.said[name, prompt][:length] == alone[jobs.index((name, prompt, length))]


def test_a_sampled_answer_depends_on_its_seed_and_not_on_its_company(house, running):
    served = running(slots=8, waiting=100)

    def asked(seed):
        return Question(house.prompts[4], "red", Sampling(1.5, 0.9, 12), seed)

    alone = served.answer(asked(5))[1].tokens
    with ThreadPoolExecutor(8) as pool:
        crowd = list(pool.map(lambda n: served.answer(asked(n))[1].tokens, [5, 1, 2, 5, 3, 4, 5]))
    assert crowd[0] == crowd[3] == crowd[6] == alone
    assert len(set(crowd)) == 5
    greedy = house.question("red", house.prompts[4], 12)
    assert served.answer(greedy)[1].tokens == house.said["red", house.prompts[4]][:12]
    free = {served.answer(asked(None))[1].tokens for _ in range(3)}
    assert len(free) > 1


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}), ("qwen2", {}), ("qwen3", {}), ("phi3", {"sliding_window": 24}),
        ("mistral", {"sliding_window": 24}), ("gemma2", {"sliding_window": 24}),
        ("gemma3_text", {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    ],
)  # fmt: skip
def test_rows_of_every_family_agree_with_a_whole_pass(kind, changes):
    """Also where a layer looks back no further than its window."""
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 300, "max_position_embeddings": 256,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if kind == "phi3":
        del sizes["head_dim"]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(sizes | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    table = Slots(model, Stacked(model, {}), 3)
    rows = {0: torch.randint(300, (70,)).tolist(), 2: torch.randint(300, (9,)).tolist()}
    for slot, ids in rows.items():
        first = table.fill(slot, ids[:-5], None)
        whole = model(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(first, whole[-6], atol=1e-4, rtol=1e-4)
    for n in range(5):
        found = table.step([rows[0][n - 5], 0, rows[2][n - 5]])
        for slot, ids in rows.items():
            whole = model(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(found[slot], whole[n - 5], atol=1e-4, rtol=1e-4)
    if changes:
        free = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **(sizes | {"sliding_window": 500}))
        )
        free.load_state_dict(model.state_dict())
        far = free.eval()(torch.tensor([rows[0]])).logits[0, -1]
        assert not torch.allclose(far, whole_end(model, rows[0]), atol=1e-4)  # the window is felt


def whole_end(model, ids):
    return model(torch.tensor([ids])).logits[0, -1]


def test_layers_that_keep_no_keys_are_refused():
    config = AutoConfig.for_model("llama")
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match="layers of the kind 'linear_attention'"):
        slots.windows(config)


def test_taking_the_adapters_off_leaves_the_base_as_it_was(house):
    ids = torch.tensor([house.prompts[0]])
    with torch.inference_mode():
        before = house.base(ids).logits
        twin = Stacked(house.base, {"red": house.matrices["red"]})
        with twin.use("red"):
            assert not torch.equal(house.base(ids).logits, before)
        assert torch.equal(house.base(ids).logits, before)  # nobody's, when nobody is named
        twin.take_off()
        with twin.use("red"):
            assert torch.equal(house.base(ids).logits, before)


def test_an_adapter_that_trained_rows_of_the_embedding_is_sent_to_be_merged(tiny, cpu):
    recipe = recipe_from(
        {"model": {"name": str(tiny)}, "data": {"train": ROWS, "max_length": 512},
         "lora": {"r": 4}, "quant": {"cache": False},
         "run": {"name": "engine"}}
    )  # fmt: skip
    base = loader.load_base(recipe, cpu, loader.read_config(recipe), bars=False).model
    on = adapter.attach(base, recipe, new_tokens=[5, 6])
    with pytest.raises(CheckpointError, match=r"mine: rows of the embedding .* `qlora merge`"):
        adapter.take_off(on, "default", "mine")


# --- choosing


def test_a_throw_falls_on_each_token_as_often_as_transformers_would_choose_it():
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(2)) * 2
    samplings = [Sampling(0.7, 1.0), Sampling(1.0, 0.6), Sampling(1.6, 0.0)]
    count = 4000
    throws = [(n + 0.5) / count for n in range(count)]
    found = torch.zeros(3, 12)
    for throw in throws:
        for row, token in enumerate(engine.choose(logits, samplings, [throw] * 3)):
            found[row, token] += 1 / count
    for row, sampling in enumerate(samplings):
        scores = logits[row : row + 1] / sampling.temperature
        scores = TopPLogitsWarper(max(sampling.top_p, 1e-9))(None, scores)
        torch.testing.assert_close(found[row], scores.softmax(-1)[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 5e-324])
def test_at_a_temperature_near_zero_the_likeliest_is_chosen(temperature):
    logits = torch.tensor([[0.0, 5.0, 20.0, 1.0]])
    assert engine.choose(logits, [Sampling(temperature)], [0.999]) == [2]


def test_at_temperature_zero_the_likeliest_is_chosen_beside_rows_that_are_sampled():
    logits = torch.tensor([[0.0, 3.0, 2.9], [0.0, 3.0, 2.9]])
    assert engine.choose(logits, [Sampling(), Sampling(1.0)], [0.0, 0.999999])[0] == 1
    assert engine.choose(logits, [Sampling(), Sampling(1.0)], [0.0, 0.999999])[1] == 0
    assert engine.choose(logits, [Sampling(), Sampling(1.0, 0.5)], [0.0, 0.999999]) == [1, 1]


# --- text


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(EVERY)), data=st.data())
def test_the_pieces_are_the_text_and_no_letter_is_cut(name, data):
    tok = tokenizer_of(name)
    words = st.sampled_from(
        ["Hello", " world", "Grüße 東京 ", "😀👩\u200d👧", "\n\n", " a", "{'b': 1}"]
    )
    ids = tok("".join(data.draw(st.lists(words, max_size=8))), add_special_tokens=False)[
        "input_ids"
    ]
    ids += data.draw(st.lists(st.integers(0, len(tok) - 1), max_size=6))
    whole = tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    spelling = Spelling(tok)
    pieces = [spelling.feed(token) for token in ids]
    last = spelling.finish()
    if "\ufffd" not in whole or "bytes" in EVERY[name].kind:
        assert "".join(pieces) + last == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("stop", "text"),
    [(("fox",), "The quick brown "), (("quick brown",), "The "), (("zebra",), None), (("zebra", "T"), ""),
     (("own fox jumps",), "The quick br"), (("dog.", "brown"), "The quick "), (("dog..",), None)],
)  # fmt: skip
def test_a_stop_string_ends_the_text_before_it_wherever_tokens_cut_it(stop, text):
    tok = AutoTokenizer.from_pretrained(BASE)
    said = "The quick brown fox jumps over the lazy dog."
    spelling, pieces = Spelling(tok, stop), []
    for token in tok(said)["input_ids"]:
        pieces.append(spelling.feed(token))
        if spelling.ended:
            break
    pieces.append(spelling.finish())
    assert "".join(pieces) == (said if text is None else text)
    assert spelling.ended is (text is not None)


def test_an_answer_ends_at_a_stop_string_and_its_row_is_free(house, running):
    served = running(slots=1, waiting=2)
    whole, _ = served.answer(house.question("red", house.prompts[0]))
    word = whole[4:9]
    text, ending = served.answer(house.question("red", house.prompts[0], stop=(word,)))
    assert (text, ending.reason) == (whole[: whole.index(word)], "stop")
    assert len(ending.tokens) < LENGTH
    assert served.active == 0


# --- the queue


@pytest.fixture
def held(house, running, monkeypatch):
    """An engine whose steps wait until they are let go."""
    gate = threading.Event()
    original = Slots.step

    def slow(self, tokens):
        gate.wait(30)
        return original(self, tokens)

    monkeypatch.setattr(Slots, "step", slow)
    yield lambda **limits: (running(**limits), gate)
    gate.set()


def test_a_full_queue_refuses_all_of_a_request_and_says_when_to_come_again(house, held):
    served, gate = held(slots=2, waiting=1)
    ears = [Ear() for _ in range(3)]
    served.ask([house.question("red", house.prompts[0])] * 2, ears[:2])
    with pytest.raises(
        Busy, match="2 requests are being answered or wait, of at most 3"
    ) as refused:
        served.ask([house.question("red", house.prompts[1])] * 2, [Ear(), Ear()])
    assert 1 <= refused.value.seconds <= 60
    served.ask([house.question("blue", house.prompts[1])], ears[2:])
    with pytest.raises(Busy):
        served.ask([house.question("blue", house.prompts[1])], [Ear()])
    gate.set()
    assert [ear.wait().reason in engine.ANSWERED for ear in ears] == [True] * 3
    assert ears[2].ending.tokens == house.said["blue", house.prompts[1]]


def test_one_that_nobody_waits_for_frees_its_row_for_the_next(house, held):
    served, gate = held(slots=1, waiting=2)
    first, second, third = Ear(), Ear(), Ear()
    (gone,) = served.ask([house.question("red", house.prompts[0], 500)], [first])
    (never,) = served.ask([house.question("red", house.prompts[0])], [second])
    served.ask([house.question("green", house.prompts[1])], [third])
    assert first.began.wait(30)
    gone.cancel()
    never.cancel()
    gate.set()
    assert third.wait().tokens == house.said["green", house.prompts[1]]
    assert first.wait().reason == second.wait().reason == "cancelled"
    assert len(first.ending.tokens) < 4 and second.ending.tokens == ()


def test_one_that_takes_too_long_is_ended_also_where_it_still_waits(house, held):
    served, gate = held(slots=1, waiting=1, seconds=0.3)
    ears = [Ear(), Ear()]
    served.ask([house.question("red", house.prompts[0], 500)] * 2, ears)
    time.sleep(0.4)
    gate.set()
    assert [ear.wait().reason for ear in ears] == ["timeout", "timeout"]
    assert served.answer(house.question("red", house.prompts[1], 3))[1].reason == "length"


@pytest.mark.parametrize(
    ("error", "reason"),
    [(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "memory"),
     (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory"),
     (ValueError("secret words"), "failed")],
)  # fmt: skip
@pytest.mark.parametrize("where", ["step", "fill"])
def test_a_pass_that_fails_ends_its_questions_and_not_the_engine(
    house, running, monkeypatch, error, reason, where
):
    served = running(slots=2, waiting=2)
    original = getattr(Slots, where)

    def fail(*args):
        raise error

    monkeypatch.setattr(Slots, where, fail)
    assert served.answer(house.question("red", house.prompts[0]))[1].reason == reason
    monkeypatch.setattr(Slots, where, original)
    again = served.answer(house.question("red", house.prompts[0]))[1]
    assert again.tokens == house.said["red", house.prompts[0]]
    assert served.is_alive and served.active == served.queued == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_leaves_nobody_waiting(house, running, monkeypatch):
    """A card that was lost fails at each call, also where its memory is given back."""
    served = running(slots=1, waiting=2)

    def lost(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Slots, "step", lost)
    monkeypatch.setattr(engine.gc, "collect", lost)
    ears = [Ear() for _ in range(3)]
    served.ask([house.question("red", house.prompts[0])] * 3, ears)
    assert [ear.wait().reason for ear in ears] == ["failed"] * 3
    served._thread.join(30)
    assert not served.is_alive and served.active == served.queued == 0
    with pytest.raises(Closed):
        served.ask([house.question("red", house.prompts[0])], [Ear()])


def test_a_prompt_there_is_no_memory_for_leaves_the_others_theirs(house, monkeypatch):
    table = Slots(house.base, house.stacked, 2)
    table.fill(0, house.prompts[0], "red")
    widen, wide = slots._Layer.widen, []

    def full(self, width):
        if width > slots.COLUMNS:
            wide.append(width)
            if len(wide) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
        widen(self, width)

    monkeypatch.setattr(slots._Layer, "widen", full)
    with pytest.raises(torch.OutOfMemoryError):
        table.fill(1, house.prompts[2] * 10, "blue")
    assert len(wide) == 3
    assert {layer.keys.shape[2] for layer in table._layers} == {slots.COLUMNS}
    said = house.said["red", house.prompts[0]]
    assert int(table.step([said[0], 0])[0].argmax()) == said[1]


def test_logits_that_are_not_finite_fail_their_own_row_alone(house, running, monkeypatch):
    served = running(slots=2, waiting=2)
    original = Slots.step

    def poisoned(self, tokens):
        logits = original(self, tokens).clone()
        logits[[name == "red" for name in self.adapters]] = float("nan")
        return logits

    monkeypatch.setattr(Slots, "step", poisoned)
    ears = [Ear(), Ear()]
    served.ask([house.question(name, house.prompts[0]) for name in ("red", "blue")], ears)
    assert ears[0].wait().reason == "failed"
    assert ears[1].wait().tokens == house.said["blue", house.prompts[0]]


def test_a_nan_that_was_left_in_a_row_does_not_reach_who_comes_after(house):
    table = Slots(house.base, house.stacked, 2)
    table.fill(0, house.prompts[2], "red")
    table.fill(1, house.prompts[1], "red")
    for layer in table._layers:
        layer.keys[0] = float("nan")
        layer.values[0] = float("nan")
    table.free(0)
    table.fill(0, house.prompts[1], "red")
    logits = table.step([9, 9])
    assert torch.equal(logits[0], logits[1])


def test_closing_answers_what_was_taken_and_takes_nothing_more(house, held):
    served, gate = held(slots=1, waiting=1)
    ears = [Ear(), Ear()]
    served.ask([house.question("red", p) for p in house.prompts[:2]], ears)
    closing = threading.Thread(target=served.close)
    closing.start()
    while not served._closed:
        time.sleep(0.01)
    with pytest.raises(Closed, match="stopping"):
        served.ask([house.question("red", house.prompts[0])], [Ear()])
    gate.set()
    closing.join(30)
    assert not served.is_alive
    assert [ear.ending.tokens for ear in ears] == [house.said["red", p] for p in house.prompts[:2]]
