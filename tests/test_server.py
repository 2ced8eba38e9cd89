"""Served over HTTP: OpenAI's own client is understood, and whatever else comes is told why not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from conftest import REPOSITORY
from families import EVERY, tokenizer_of
from rich.console import Console
from safetensors.torch import load_file, save_file

from qlora import address, engine, server, trained
from qlora.engine import Ending
from qlora.engine.slots import Slots
from qlora.errors import CheckpointError, ModelError, ServerError
from qlora.generation import Sampling, stream
from qlora.records import Record, Turn
from qlora.rendering import Renderer
from qlora.server import protocol, schemas, serving
from qlora.server.meter import Meter
from qlora.server.serving import Limits, Serving
from qlora.trained import Trained

pytestmark = pytest.mark.usefixtures("one_thread", "light")
QUESTIONS = ("Say 7.", "Say 12 and then 13.", "What is the sea?")
LENGTH = 10


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory, one_thread):
    """A finished run of the tiny model, and three copies whose adapters are others."""
    from qlora import trainer
    from qlora.recipe import recipe_from

    folder = tmp_path_factory.mktemp("served")
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}"} for n in range(1, 60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_from(
        {
            "model": {"name": str(tiny)},
            "data": {"train": str(folder / "rows.jsonl"), "max_length": 64},
            "train": {
                "max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 2e-2,
                "gradient_accumulation_steps": 1, "warmup_steps": 0, "save_steps": 12,
                "activation_checkpointing": False,
            },
            "lora": {"r": 4}, "eval": {"generate": 0}, "run": {"dir": str(folder), "name": "digits"},
        }
    )  # fmt: skip
    first = trainer.train(recipe, console=Console(quiet=True)).dir
    found = [first]
    for name in ("red", "green", "blue"):
        other = folder / name / first.name
        shutil.copytree(first, other)
        file = other / "adapter" / "adapter_model.safetensors"
        noise = torch.Generator().manual_seed(len(name))
        weights = load_file(file)
        save_file(
            {k: torch.randn(w.shape, generator=noise) * 0.3 for k, w in weights.items()}, file
        )
        found.append(other)
    return found


@pytest.fixture(scope="module")
def alone(runs):
    """What `qlora chat` would get from each run and from the base: one model, one question at a time."""
    said = {}
    for run in runs:
        found = trained.find(run)
        model = trained.load(found)
        for question in QUESTIONS:
            prompt = found.prompt_ids([Turn("user", question)])
            sampling = Sampling(max_new_tokens=LENGTH)
            said[found.name, question] = stream(model, found.tok, prompt, sampling, lambda _: None)
            if run is runs[0]:
                from qlora import adapter

                with adapter.disabled(model):
                    answer = stream(model, found.tok, prompt, sampling, lambda _: None)
                said["base", question] = answer
    return said


@contextlib.contextmanager
def live(serving_, keys=(), loopback=True):
    """A real server on a port of this machine; yields its address."""
    meter = Meter()
    sock = address.listen("127.0.0.1", 0)
    made = server.make(server.create(serving_, meter, keys, loopback))
    thread = threading.Thread(target=lambda: asyncio.run(made._serve(sockets=[sock])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        made.should_exit = made.force_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def opened(runs):
    meter = Meter()
    made = Serving(
        [trained.find(run) for run in runs],
        Limits(slots=4, waiting=6, max_new_tokens=400),
        server.heard_by(meter),
    )
    made.engine.start()
    yield made
    made.engine.close(wait=False)


@pytest.fixture(scope="module")
def url(opened):
    with live(opened) as where:
        yield where


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def messages(text):
    return [{"role": "user", "content": text}]


def post(url, path="/v1/chat/completions", **body):
    return httpx.post(f"{url}{path}", json=body, timeout=30)


def fault(answer):
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text and "/" not in body["error"]["type"]
    return body["error"]["message"]


# --- OpenAI's client


def test_each_model_answers_as_it_does_alone_chosen_by_its_name(client, alone, opened):
    assert [model.id for model in client.models.list()][-1] == "base"
    assert {name for name, _ in alone} == set(opened.voices)
    for (name, question), answer in alone.items():
        said = client.chat.completions.create(
            model=name, messages=messages(question), max_tokens=LENGTH, temperature=0
        )
        (choice,) = said.choices
        assert choice.message.content.strip() == answer.text
        assert choice.finish_reason == ("stop" if answer.stopped else "length")
        assert said.model == name and said.object == "chat.completion"
    assert len({answer.text for answer in alone.values()}) > 8


def test_eight_clients_over_four_adapters_hear_what_one_alone_hears(client, alone):
    jobs = [*alone] * 2

    def ask(job):
        said = client.chat.completions.create(
            model=job[0], messages=messages(job[1]), max_tokens=LENGTH
        )
        return said.choices[0].message.content.strip()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, jobs)) == [alone[job].text for job in jobs]


def test_a_stream_is_the_same_answer_in_pieces_with_its_usage_at_the_end(client, opened):
    asked = {"model": "red", "messages": messages(QUESTIONS[1]), "max_tokens": LENGTH}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content and len(pieces) > 4
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and set(reasons[:-1]) == {None}
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1
    prompt = opened.voice("red").found.prompt_ids([Turn("user", QUESTIONS[1])])
    assert whole.usage.prompt_tokens == len(prompt)
    assert 0 < whole.usage.completion_tokens <= LENGTH
    assert whole.usage.total_tokens == len(prompt) + whole.usage.completion_tokens


def test_events_are_written_as_openai_writes_them(url):
    body = {"model": "red", "messages": messages("Say 7."), "max_tokens": 3, "stream": True}
    answer = post(url, **body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") and "\n" not in event for event in events[:-2])


def test_plain_texts_and_tokens_are_completed_each_as_one_choice(client, opened):
    voice = opened.voice("base")
    ids = voice.found.tok("Once upon a time")["input_ids"]
    asked = {"model": "base", "max_tokens": 6, "temperature": 0}
    both = client.completions.create(prompt=["Once upon a time", "The sea"], **asked)
    one = client.completions.create(prompt="Once upon a time", **asked)
    tokens = client.completions.create(prompt=ids, **asked)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == one.choices[0].text == tokens.choices[0].text
    assert one.usage.prompt_tokens == tokens.usage.prompt_tokens == len(ids)
    chunks = client.completions.create(prompt=["Once upon a time", "The sea"], stream=True, **asked)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in both.choices]


def test_a_seed_draws_the_same_answer_again_and_stop_cuts_it(client):
    asked = {"model": "red", "messages": messages("Say 7."), "max_tokens": 12, "temperature": 1.5}

    def say(**more):
        return client.chat.completions.create(**asked, **more).choices[0]

    first = say(seed=3)
    assert first.message.content == say(seed=3).message.content
    assert len({say(seed=n).message.content for n in range(4)}) > 1
    cut = say(seed=3, stop=[first.message.content[3:5]])
    assert first.message.content.startswith(cut.message.content)
    assert cut.finish_reason == "stop" and len(cut.message.content) <= 3


def test_more_prompts_than_there_is_room_for_are_not_even_cut_into_tokens(client, opened):
    with pytest.raises(
        openai.BadRequestError, match=r"holds 11 prompts.* at most 10 at once"
    ) as bad:
        client.completions.create(model="base", prompt=["x"] * 11)
    assert bad.value.param == "prompt"


def test_long_rows_that_would_turn_the_frequencies_of_short_ones_are_not_taken():
    from transformers import AutoModelForCausalLM, Phi3Config

    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4, "original_max_position_embeddings": 32, "factor": 8.0}  # fmt: skip
    config = Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=256, pad_token_id=0, rope_parameters=rope,
        original_max_position_embeddings=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert serving.positions(model, Limits()) == 32
    with pytest.raises(ModelError, match="--max-length is 33"):
        serving.positions(model, Limits(max_length=33))


def test_errors_come_as_the_clients_own_kinds(client):
    asked = {"model": "red", "messages": messages("Hi")}
    with pytest.raises(
        openai.NotFoundError, match=r"no model 'purple' here\. There are: .*green.*base"
    ):
        client.chat.completions.create(**{**asked, "model": "purple"})
    with pytest.raises(
        openai.BadRequestError, match="temperature is 3; it may be from 0 to 2"
    ) as bad:
        client.chat.completions.create(**asked, temperature=3)
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match=r"n cannot be honoured here.* or write 1"):
        client.chat.completions.create(**asked, n=2)
    with pytest.raises(openai.BadRequestError, match="logprobs cannot be honoured"):
        client.chat.completions.create(**asked, logprobs=True)
    with pytest.raises(openai.BadRequestError, match=r"'top_k' is not a field .* mean 'top_p'"):
        client.chat.completions.create(**asked, extra_body={"top_k": 4})
    with pytest.raises(openai.BadRequestError, match=r"at most 400 \(--max-new-tokens\)"):
        client.chat.completions.create(**asked, max_tokens=401)
    with pytest.raises(openai.BadRequestError, match="last of messages is of assistant"):
        client.chat.completions.create(
            model="red", messages=[*messages("Hi"), {"role": "assistant", "content": "Ho"}]
        )
    with pytest.raises(openai.BadRequestError, match=r"chat template of .* shows no tools"):
        tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
        client.chat.completions.create(**asked, tools=[tool])
    done = client.chat.completions.create(
        **asked, max_completion_tokens=2, user="me", metadata={"a": "b"}, n=1, presence_penalty=0
    )
    assert done.usage.completion_tokens <= 2


# --- what is refused


def test_a_prompt_that_has_no_room_is_refused_with_the_numbers(url):
    long = " ".join(["one two three"] * 300)
    answer = post(url, model="red", messages=messages(long))
    assert answer.status_code == 400
    numbers = re.search(r"prompt has ([\d,]+) tokens; the model has 512 positions", fault(answer))
    assert int(numbers[1].replace(",", "")) > 512
    half = post(url, model="red", messages=messages(" ".join(["one"] * 200)), max_tokens=400)
    assert half.status_code == 400 and "and max_tokens 400; the model has 512" in fault(half)


@pytest.mark.parametrize("length", [2**20 + 1, 10 * 2**20])
def test_a_body_beyond_a_mebibyte_is_refused_and_the_next_answered(url, client, length):
    answer = post(url, model="red", messages=messages("x" * length))
    assert answer.status_code == 413 and "more than 1,048,576 bytes" in fault(answer)
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(model="red", messages=messages("x" * length))
    assert refused.value.status_code == 413
    assert post(url, model="red", messages=messages("Hi"), max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not valid JSON"), (b"", "not valid JSON"), (b"\xff\xfe{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"), (b'{"model": NaN}', "not valid JSON"), (b"[1]", "found a list"),
        (b"null", "found null"), (b'{"model": "\\ud800"}', "half of a surrogate"),
        (b'{"model": "red"}', "messages is missing"), (b'{"model": 3}', "model must be text"),
        (b'{"model": "red", "messages": []}', "no turns"),
        (b'{"model": "red", "messages": [{"role": "king", "content": "x"}]}', "'king'"),
        (b'{"model": "red", "messages": [{"role": "user", "content": [{"type": "image"}]}]}', "image"),
        (b'{"model": "red", "messages": "Hi"}', "must be a list"),
        (b'{"model": "red", "messages": [{"role": "user", "content": "x"}], "seed": true}', "seed must be"),
        (b'{"model": "red", "messages": [{"role": "user", "content": "x"}], "stop": [""]}', "stop must be"),
        (b'{"model": "red", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1'
         + b"0" * 5000 + b"}", "not valid JSON"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_a_400_that_says_why(url, body, said):
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400 and said in fault(answer)


def test_paths_methods_and_kinds_that_are_not_served_say_so(url):
    gone = httpx.get(f"{url}/v1/files")
    assert gone.status_code == 404 and "nothing that this server does" in fault(gone)
    wrong = httpx.get(f"{url}/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST" and fault(wrong)
    plain = httpx.post(
        f"{url}/v1/completions", content=b'{"model": "red", "prompt": "x"}',
        headers={"Content-Type": "text/plain"},
    )  # fmt: skip
    assert plain.status_code == 400 and "application/json" in fault(plain)
    assert httpx.get(f"{url}/docs").status_code == 404


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_page_that_pointed_its_own_name_here_is_refused(url, host):
    answer = httpx.get(f"{url}/v1/models", headers={"Host": host})
    assert answer.status_code == 400 and "Host header" in fault(answer)
    port = url.rpartition(":")[2]
    for own in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}"):
        assert httpx.get(f"{url}/health", headers={"Host": own}).json() == {"status": "ok"}


def test_no_page_of_another_origin_is_let_in(url):
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{url}/v1/chat/completions", headers=asked)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_with_keys_only_those_who_have_one_are_answered(opened):
    keys = ("k" * 20, "another key of mine")
    with live(opened, keys, loopback=False) as where:
        for given in (None, "Bearer", "Bearer wrong", f"Basic {keys[0]}", f"Bearer {keys[0]}x"):
            headers = {"Authorization": given} if given else {}
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
                answer = httpx.get(f"{where}{path}", headers=headers)
                assert answer.status_code == 401 and "a key is needed" in fault(answer)
                assert answer.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{where}/health").status_code == 200
        for key in keys:
            with openai.OpenAI(base_url=f"{where}/v1", api_key=key, max_retries=0) as known:
                assert "red" in [model.id for model in known.models.list()]
        with (
            openai.OpenAI(base_url=f"{where}/v1", api_key="x" * 20, max_retries=0) as unknown,
            pytest.raises(openai.AuthenticationError),
        ):
            unknown.models.list()


# --- under load


@pytest.fixture
def held(opened, monkeypatch):
    """Steps wait until they are let go."""
    gate = threading.Event()
    original = Slots.step

    def slow(self, tokens):
        gate.wait(20)
        return original(self, tokens)

    monkeypatch.setattr(Slots, "step", slow)
    yield gate
    gate.set()
    wait_until(lambda: opened.engine.active == opened.engine.queued == 0)


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_answers_429_and_when_to_come_again(url, client, opened, held):
    asked = {"model": "red", "messages": messages("Say 7."), "max_tokens": 3}
    with ThreadPoolExecutor(10) as pool:
        taken = [pool.submit(post, url, **asked) for _ in range(10)]
        wait_until(lambda: opened.engine.active + opened.engine.queued == 10)
        with pytest.raises(
            openai.RateLimitError, match="10 requests are being answered or wait"
        ) as full:
            client.chat.completions.create(**asked)
        assert full.value.code == "queue_full"
        assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
        shown = httpx.get(f"{url}/metrics").text
        numbers = re.findall(r"^qlora_(?:queue_length|active_requests) (\d+)$", shown, re.M)
        assert sum(map(int, numbers)) == 10
        held.set()
        answers = {
            job.result().text.partition('"choices"')[2].partition('"usage"')[0] for job in taken
        }
    assert len(answers) == 1


def test_a_client_that_leaves_in_mid_stream_frees_its_row(url, opened, held):
    held.set()
    asked = {"model": "red", "messages": messages("Say 7."), "max_tokens": 400, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=20) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        held.clear()
        wait_until(lambda: opened.engine.active == 1)
        (row,) = opened.engine._rows.values()
    wait_until(lambda: row.cancelled)
    held.set()
    wait_until(lambda: opened.engine.active == 0)
    assert len(row.tokens) < 400


def test_a_client_that_leaves_before_its_answer_is_made_frees_its_row(url, opened, held):
    asked = {"model": "red", "messages": messages("Say 7."), "max_tokens": 400}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=0.5)
    wait_until(lambda: opened.engine.active == 1)
    (row,) = opened.engine._rows.values()
    wait_until(lambda: row.cancelled)


def test_what_takes_too_long_is_a_504_or_an_error_in_the_stream(url, opened, held, monkeypatch):
    monkeypatch.setattr(opened.engine, "seconds", 0.2)
    asked = {"model": "red", "messages": messages("Say 7."), "max_tokens": 50}
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(post, url, **asked)
        pieces = pool.submit(post, url, **asked, stream=True)
        wait_until(lambda: opened.engine.active + opened.engine.queued == 2)
        time.sleep(0.3)
        held.set()
        assert whole.result().status_code == 504
        assert "was not finished within the server's limit" in fault(whole.result())
        last = pieces.result().text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(torch.OutOfMemoryError("CUDA out of memory: secret"), 503, "ran out of memory"),
     (ValueError("secret"), 500, "the model failed")],
)  # fmt: skip
def test_a_pass_that_fails_is_a_sentence_and_the_next_is_answered(
    url, monkeypatch, error, status, said
):
    original = Slots.step

    def fail(self, tokens):
        raise error

    monkeypatch.setattr(Slots, "step", fail)
    asked = {"model": "red", "messages": messages("Say 7."), "max_tokens": 5}
    answer = post(url, **asked)
    assert answer.status_code == status and said in fault(answer) and "secret" not in answer.text
    monkeypatch.setattr(Slots, "step", original)
    assert post(url, **asked).status_code == 200


def test_a_fault_of_our_own_is_a_sentence_too_and_says_nothing_of_the_request(
    url, opened, monkeypatch, capfd
):
    def fail(asked):
        raise KeyError("secret")

    monkeypatch.setattr(opened, "questions", fail)
    answer = post(url, model="red", messages=messages("my secret"))
    assert answer.status_code == 500 and "the server failed" in fault(answer)
    out = capfd.readouterr()
    assert "secret" not in answer.text + out.out + out.err and "KeyError" in out.err


def test_metrics_count_requests_tokens_and_batches_and_hold_no_words(url, client):
    def read():
        text = httpx.get(f"{url}/metrics").text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        assert "Say" not in text
        return {name: float(value) for name, _, value in lines}

    before = read()
    name = client.models.list().data[-3].id
    client.chat.completions.create(model=name, messages=messages("Say 7."), max_tokens=4)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=messages("Say 7."))
    after = read()

    def grown(key):
        return after.get(key, 0) - before.get(key, 0)

    assert grown(f'qlora_requests_total{{model="{name}",status="200"}}') == 1
    assert grown('qlora_requests_total{model="?",status="404"}') == 1
    assert grown(f'qlora_request_seconds_count{{model="{name}"}}') == 1
    assert grown("qlora_decode_steps") >= 1 and grown("qlora_decode_rows") >= 1


# --- its own description is true


def test_it_answers_as_its_openapi_says_whatever_is_sent(opened, url):
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        negative_data_rejection,
        response_headers_conformance,
        response_schema_conformance,
        status_code_conformance,
        unsupported_method,
    )

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    checks = [
        not_a_server_error, status_code_conformance, content_type_conformance,
        response_headers_conformance, response_schema_conformance, negative_data_rejection,
        unsupported_method,
    ]  # fmt: skip
    statuses = {"positive": set(), "negative": set()}

    def fuzz(operation, mode):
        @settings(
            max_examples=30, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case):
            body = case.body
            if isinstance(body, dict) and isinstance(body.get("model"), str) and body["model"]:
                body["model"] = (
                    "red"  # any other name is a 404, and nothing more would be looked at
                )
                if mode.value == "positive":
                    body.pop("max_completion_tokens", None)
                    body["max_tokens"] = 2
            answer = case.call(timeout=30)
            statuses[mode.value].add(answer.status_code)
            case.validate_response(answer, checks=checks)

        send()

    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 5
    for operation in operations:
        fuzz(operation, schemathesis.GenerationMode.POSITIVE)
        if operation.method == "post":  # without input nothing can be wrong
            fuzz(operation, schemathesis.GenerationMode.NEGATIVE)
    assert statuses == {"positive": {200, 400}, "negative": {400}}
    assert opened.engine.is_alive


# --- asked as it was trained


class _Echo:
    """Stands where the engine stands; keeps what it is asked and says nothing."""

    def __init__(self):
        self.asked = []

    def ask(self, questions, tells):
        self.asked += questions
        for tell in tells:
            tell("", Ending("stop", (1,), 0.0))
        return []


def front(found, **more):
    """A server's front for one model, with an :class:`_Echo` in the place of the engine."""
    made = object.__new__(Serving)
    made.voices, made.aliases = serving.names([found])
    made.limits, made.began, made.positions, made.vocabulary = Limits(), 0, 4096, 10**6
    made._asking, made.engine = threading.Lock(), _Echo()
    return made


def told(renderer, form="messages"):
    return Trained("mine", None, None, None, None, renderer, form, None)


def ask(made, path="/v1/chat/completions", **body):
    async def go():
        transport = httpx.ASGITransport(server.create(made, Meter()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as known:
            return await known.post(path, json={"model": "mine", **body})

    return asyncio.run(go())


@pytest.mark.parametrize("name", EVERY)
def test_a_request_has_the_tokens_that_its_row_has_in_training(name):
    tok = tokenizer_of(name)
    renderer = Renderer(tok, chat=True)
    made = front(told(renderer))
    system = [Turn("system", "Be brief.")] if EVERY[name].system else []
    talk = [
        *system, Turn("user", "What is two plus two?"), Turn("assistant", "It makes 4."),
        Turn("user", "Grüße 東京, and one more?"), Turn("assistant", "Then it is 5."),
    ]  # fmt: skip
    for end in range(len(system) + 1, len(talk), 2):
        sent = [{"role": turn.role, "content": turn.content} for turn in talk[:end]]
        assert ask(made, messages=sent).status_code == 200
        row = renderer.encode(Record(tuple(talk[: end + 1])))
        prompt = made.engine.asked.pop().prompt
        assert list(prompt) == row.input_ids[: len(prompt)]
        start = row.answers[-1].start
        assert len(prompt) <= start and tok.decode(row.input_ids[len(prompt) : start]).strip() in (
            "", "<think>\n\n</think>",
        )  # fmt: skip


def test_tools_are_shown_where_the_template_can_as_in_training():
    renderer = Renderer(tokenizer_of("qwen2.5"), chat=True)
    made = front(told(renderer))
    function = {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    assert ask(made, messages=messages("Rain?"), tools=tools).status_code == 200
    record = Record((Turn("user", "Rain?"), Turn("assistant", "No.")), tools=tuple(tools))
    prompt = made.engine.asked.pop().prompt
    assert list(prompt) == renderer.encode(record).input_ids[: len(prompt)]
    assert "get_weather" in renderer.tok.decode(prompt)
    assert ask(made, messages=messages("Rain?"), tools=tools, tool_choice="none").status_code == 200
    assert "get_weather" not in renderer.tok.decode(made.engine.asked.pop().prompt)
    forced = ask(made, messages=messages("Rain?"), tools=tools, tool_choice="required")
    assert forced.status_code == 400 and "cannot be forced" in fault(forced)


def test_a_model_of_plain_rows_is_asked_as_they_were_and_for_one_answer_alone():
    tok = tokenizer_of("alpaca")
    made = front(told(Renderer(tok, chat=False), "alpaca"))
    assert ask(made, messages=messages("Say 3.")).status_code == 200
    prompt = made.engine.asked.pop().prompt
    assert list(prompt) == tok("### Instruction:\nSay 3.\n\n### Response:\n")["input_ids"]
    assert prompt[0] == tok.bos_token_id
    two = [{"role": "system", "content": "Be brief."}, *messages("Say 3.")]
    refused = ask(made, messages=two)
    assert refused.status_code == 400 and "one message, the user's" in fault(refused)
    assert ask(made, "/v1/completions", prompt="Say 3.").status_code == 200
    assert list(made.engine.asked.pop().prompt) == tok("Say 3.")["input_ids"]


def test_turns_that_a_template_refuses_are_a_400():
    made = front(told(Renderer(tokenizer_of("gemma"), chat=True)))
    answer = ask(made, messages=[{"role": "system", "content": "Be brief."}, *messages("Hi")])
    assert answer.status_code == 400 and "refuses the turns" in fault(answer)


def test_requests_are_described_field_by_field_as_they_are_read():
    for kind in ("chat", "completion"):
        described = set(schemas.request(kind)["properties"])
        assert described == {*protocol.HONOURED[kind], *protocol.HARMLESS, *protocol.NEUTRAL}


# --- opening


def test_a_run_a_checkpoint_and_a_recipe_have_names_of_their_own(runs):
    found = [trained.find(where) for where in (*runs, runs[0] / "checkpoints" / "checkpoint-12")]
    voices, aliases = serving.names(found)
    start = runs[0].name
    assert set(voices) == {
        f"digits/{start}", f"digits/{start}/checkpoint-12", f"red/{start}", f"green/{start}",
        f"blue/{start}", "base",
    }  # fmt: skip
    assert aliases["red"] == f"red/{start}" and set(aliases) == {"digits", "red", "green", "blue"}
    with pytest.raises(CheckpointError, match="named twice"):
        serving.names([found[0], found[0]])


def test_a_model_without_an_adapter_is_served_and_only_alone(tiny, runs):
    plain = trained.find(tiny)
    made = Serving([plain], Limits(slots=2))
    made.engine.start()
    try:
        assert list(made.voices) == [tiny.name] and not made.aliases
        said, ending = serving.ask(
            made, tiny.name, [Turn("user", "Hi")], Sampling(max_new_tokens=5)
        )
        model = trained.load(plain)
        prompt = plain.prompt_ids([Turn("user", "Hi")])
        wanted = stream(model, plain.tok, prompt, Sampling(max_new_tokens=5), lambda _: None)
        assert said.strip() == wanted.text and ending.reason in engine.ANSWERED
    finally:
        made.engine.close()
    with pytest.raises(CheckpointError, match=r"shares its base with no other. Serve it alone"):
        serving.names([trained.find(runs[0]), plain])


def test_runs_of_two_bases_are_refused_before_anything_is_loaded(runs, tmp_path, monkeypatch):
    other = tmp_path / "other" / "20260101-120000"
    shutil.copytree(runs[0], other)
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("double_quant: true", "double_quant: false"))
    monkeypatch.setattr(trained, "load_base", None)
    with pytest.raises(CheckpointError, match=r"not trained on one base: quant.double_quant"):
        Serving([trained.find(runs[0]), trained.find(other)])


def test_what_would_be_served_wrong_is_found_before_the_first_request(runs, monkeypatch):
    from qlora import adapter

    original = adapter.take_off

    def doubled(*args):
        base, matrices = original(*args)
        return base, {name: (a, b, 2 * scale) for name, (a, b, scale) in matrices.items()}

    monkeypatch.setattr(adapter, "take_off", doubled)
    with pytest.raises(ModelError, match=r"red/.*: its logits as they would be served are .* off"):
        Serving([trained.find(runs[1])])


def test_no_more_positions_are_promised_than_there_are(runs):
    with pytest.raises(ModelError, match="--max-length is 513, and the model has 512 positions"):
        Serving([trained.find(runs[0])], Limits(max_length=513))


def test_an_address_that_others_reach_needs_a_key_of_some_length(monkeypatch):
    monkeypatch.delenv("QLORA_API_KEY", raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.5.5.5"):
        assert address.keys_for(host, ()) == []
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", "localhost.example.org"):
        with pytest.raises(ServerError, match=r"there is no key .* QLORA_API_KEY"):
            address.keys_for(host, ())
    monkeypatch.setenv("QLORA_API_KEY", "short")
    with pytest.raises(ServerError, match="has 5 characters, which can be guessed; at least 16"):
        address.keys_for("0.0.0.0", ())
    monkeypatch.setenv("QLORA_API_KEY", "k" * 16)
    assert address.keys_for("0.0.0.0", ()) == address.keys_for("localhost", ()) == ["k" * 16]
    monkeypatch.setenv("MINE", "m" * 20)
    assert address.keys_for("0.0.0.0", ("MINE", "QLORA_API_KEY")) == ["m" * 20, "k" * 16]
    with pytest.raises(ServerError, match="--api-key-env names THEIRS, which is not set"):
        address.keys_for("localhost", ("MINE", "THEIRS"))


def test_a_port_that_is_taken_and_an_address_of_others_are_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ServerError, match=f"cannot listen on 127.0.0.1, port {port}: .* --port"
        ):
            address.listen("127.0.0.1", port)
    with pytest.raises(ServerError, match=r"cannot listen on 203.0.113.9"):
        address.listen("203.0.113.9", 0)


# --- the command


def serve(*arguments, **environment):
    command = [sys.executable, "-m", "qlora", "serve", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_the_command_refuses_an_open_door_in_a_few_words_and_quickly():
    process = serve("runs/nothing", "--host", "0.0.0.0", QLORA_API_KEY="")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and not out
    assert err.startswith("qlora: --host is '0.0.0.0'") and "Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_sigterm_lets_the_answers_under_way_be_finished_and_ends_with_0(runs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = serve(runs[1], "--port", port)
    try:
        lines = [process.stdout.readline() for _ in range(5)]
        assert lines[0] == f"http://127.0.0.1:{port}/v1 without a key\n"
        assert lines[1:] == [
            "  model red\n", f"  model red/{runs[1].name}\n", "  model base\n", "Ctrl-C ends it\n",
        ]  # fmt: skip
        asked = {
            "model": "red", "messages": messages("Say 7."), "max_tokens": 300, "temperature": 2,
            "seed": 1, "stream": True,
        }  # fmt: skip
        where = f"http://127.0.0.1:{port}/v1/chat/completions"
        with httpx.stream("POST", where, json=asked, timeout=60) as answer:
            text = answer.iter_lines()
            assert next(text).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            rest = [line for line in text if line]
        assert rest[-1] == "data: [DONE]"
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_with_130_and_leaves_the_signals_as_they_were(runs):
    made = Serving([trained.find(runs[1])], Limits(slots=1))
    before = signal.getsignal(signal.SIGINT)
    sock = address.listen("127.0.0.1", 0)
    where = f"http://127.0.0.1:{sock.getsockname()[1]}/health"

    def press():
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(where).status_code == 200:
                    break
        os.kill(os.getpid(), signal.SIGINT)

    fingers = threading.Thread(target=press)
    fingers.start()
    assert server.run(made, Meter(), sock, []) == 130
    fingers.join()
    assert signal.getsignal(signal.SIGINT) is before and not made.engine.is_alive
