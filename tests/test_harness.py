"""lm-evaluation-harness on our models, against transformers' LLaMA in fp64 and the harness's own class for it."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import corpus
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

import accessory
from accessory import harness
from accessory.config import ModelConfig, Precision
from accessory.errors import UserError
from accessory.flags import rewrite
from accessory.harness_model import HarnessModel, generation_settings
from accessory.tools import EVALUATE_FLAGS, EvaluateConfig, evaluate, evaluate_main

POSITIONS = 256
PAIRS = [
    ("the text wrapper breaks", " long lines"),
    ("the text wrapper", " breaks long lines into short ones"),
    ("", "whitespace is kept"),
    ("wrap ", "it"),
    ("keep the lines", " short"),
    ("keep the lines", " as they are where they are short enough"),
    ("\n", "def wrap"),
]


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def model(hf_folder):
    return accessory.load_model(str(hf_folder))


@pytest.fixture(scope="module")
def reference(hf_folder):
    return AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float64)


@torch.no_grad()
def log_probabilities(reference, ids: list[int]) -> torch.Tensor:
    """fp64 [len(ids), v]: of what follows each token."""
    return reference(torch.tensor([ids])).logits[0].log_softmax(-1)


def score(reference, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The definition, one pair at a time, within the model's positions."""
    ids = (context + continuation)[-POSITIONS - 1 :]
    log_p = log_probabilities(reference, ids[:-1])[-len(continuation) :]
    likelihood = sum(log_p[i, token].item() for i, token in enumerate(continuation))
    return likelihood, log_p.argmax(-1).tolist() == continuation


# --- loglikelihood ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_loglikelihood_is_that_of_transformers_behind_bos(batch_size, model, reference):
    found = HarnessModel(model, batch_size).loglikelihood(instances("loglikelihood", *PAIRS))
    for (context, continuation), (likelihood, greedy) in zip(PAIRS, found, strict=True):
        context, spaces = context.rstrip(), context[len(context.rstrip()) :]
        before = model.tokenizer.encode(context, bos=True, eos=False)
        whole = model.tokenizer.encode(context + spaces + continuation, bos=True, eos=False)
        expected = score(reference, before, whole[len(before) :])
        assert (likelihood, greedy) == (pytest.approx(expected[0], rel=1e-5), expected[1])


def test_only_a_continuation_that_is_likeliest_token_by_token_is_greedy(model, reference):
    context, continuation = [1, 20, 30], []
    for _ in range(4):
        continuation.append(int(log_probabilities(reference, context + continuation)[-1].argmax()))
    other = [(continuation[-1] + 1) % 384]
    requests = [(None, context, continuation), (None, context, continuation[:-1] + other), (None, context, other)]
    found = HarnessModel(model, 2)._loglikelihood_tokens(requests)
    assert [greedy for _, greedy in found] == [True, False, score(reference, context, other)[1]]


def test_answers_that_differ_in_their_last_token_share_a_row(model, reference, monkeypatch):
    rows, forward = [], model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda ids: rows.append(len(ids)) or forward(ids))
    requests = [(None, [1, 20, 30, 40], [letter]) for letter in (50, 51, 52, 53)] + [(None, [1, 20], [30, 40, 50])]
    found = HarnessModel(model, 16)._loglikelihood_tokens(requests)
    assert rows == [1]
    for (_, context, continuation), (likelihood, _) in zip(requests, found, strict=True):
        assert likelihood == pytest.approx(score(reference, context, continuation)[0], rel=1e-5)


def test_context_beyond_the_models_positions_loses_its_beginning(model, reference, caplog):
    ids = model.tokenizer.encode(" ".join(corpus()), bos=True, eos=False)
    requests = [(None, ids[:400], ids[400:410]), (None, ids[:POSITIONS], ids[:1]), (None, ids[:5], ids[5:9])]
    found = HarnessModel(model, 4)._loglikelihood_tokens(requests)
    assert "1 of 3 prompts are too long for the model's 256 positions" in caplog.text
    for (_, context, continuation), (likelihood, _) in zip(requests, found, strict=True):
        assert likelihood == pytest.approx(score(reference, context, continuation)[0], rel=1e-5)


def test_continuation_beyond_the_models_positions_is_refused(model):
    with pytest.raises(UserError, match=r"a continuation of 257 tokens .* the model's 256 positions"):
        HarnessModel(model, 4)._loglikelihood_tokens([(None, [1], [5] * 257)])


def test_empty_continuation_is_certain(model):
    assert HarnessModel(model, 4)._loglikelihood_tokens([(None, [1], [])]) == [(0.0, True)]


def rolling(reference, bos: int, ids: list[int]) -> float:
    """Windows one by one: each predicts the next 256 tokens, or those that are left, behind as many tokens as fit."""
    text, total = [bos, *ids], 0.0
    for start in range(0, len(ids), POSITIONS):
        end = min(start + POSITIONS, len(ids))
        log_p = log_probabilities(reference, text[max(0, end - POSITIONS) : end])
        total += sum(log_p[i - end, text[i + 1]].item() for i in range(start, end))
    return total


def test_rolling_likelihood_is_that_of_windows_one_by_one(model, reference):
    texts = ["\n".join(corpus()[:60]), "wrap it", "", "\n".join(corpus()[60:90])]
    found = HarnessModel(model, 3).loglikelihood_rolling(instances("loglikelihood_rolling", *((t,) for t in texts)))
    encoded = [model.tokenizer.encode(text, bos=False, eos=False) for text in texts]
    assert len(encoded[0]) > 2 * POSITIONS
    assert found == pytest.approx([rolling(reference, model.tokenizer.bos_id, ids) for ids in encoded], rel=1e-5)


# --- generate_until --------------------------------------------------------------------------------------------------

PROMPTS = ["the text wrapper breaks long lines", "wrap", "keep whitespace where it should be", "def wrap(text):"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generate_until_is_models_own_generate(batch_size, model):
    expected = [model.generate([prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    stop = expected[0][3:5]
    stopped = [model.generate([prompt], max_new_tokens=8, stop_text=stop)[0] for prompt in PROMPTS]
    requests = instances(
        "generate_until",
        *((prompt, {"until": [], "max_gen_toks": 12}) for prompt in PROMPTS),
        *((prompt, {"until": [stop], "max_gen_toks": 8, "do_sample": False}) for prompt in PROMPTS),
    )
    assert HarnessModel(model, batch_size).generate_until(requests) == expected + stopped
    assert stopped[0] == expected[0][: expected[0].index(stop)]


def test_answer_ends_before_the_first_of_several_stops(model):
    whole = model.generate([PROMPTS[0]], max_new_tokens=12)[0]
    until = [whole[8:10], whole[4:6], "never there"]
    found = HarnessModel(model, 1).generate_until(
        instances("generate_until", (PROMPTS[0], {"until": until, "max_gen_toks": 12}))
    )
    assert found == [whole[: min(whole.index(stop) for stop in until[:2])]]


def test_prompt_beyond_the_models_positions_loses_its_beginning(model, caplog):
    text = " ".join(corpus())
    found = HarnessModel(model, 1).generate_until(instances("generate_until", (text, {"max_gen_toks": 6})))
    assert "1 of 1 prompts are too long" in caplog.text
    ids = model.tokenizer.encode(text, bos=True, eos=False)[-POSITIONS + 6 :]
    answer = []
    for _ in range(6):
        answer.append(int(model(torch.tensor([ids + answer]))[0, -1].argmax()))
    assert found == [model.tokenizer.decode(answer)]


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, ([], 128, 0.0, 1.0)),
        ({"until": "\n", "max_gen_toks": 9}, (["\n"], 9, 0.0, 1.0)),
        ({"until": ["a", ""], "max_new_tokens": 9, "temperature": 0.0}, (["a"], 9, 0.0, 1.0)),
        ({"do_sample": False, "temperature": 0.7}, ([], 128, 0.0, 1.0)),
        ({"do_sample": True}, ([], 128, 1.0, 1.0)),
        ({"temperature": 0.7, "top_p": 0.9, "num_beams": 1, "top_k": None}, ([], 128, 0.7, 0.9)),
    ],
)
def test_generation_settings_mean_what_the_harness_means(stated, expected):
    assert tuple(generation_settings(stated, POSITIONS).values()) == expected


@pytest.mark.parametrize(
    ("stated", "complaint"),
    [
        ({"num_beams": 4}, r"generation_kwargs num_beams=4: not offered here; until, max_gen_toks, do_sample"),
        ({"max_gen_toks": 256}, r"max_gen_toks=256: must be above 0 and below the model's 256 positions"),
    ],
)
def test_generation_settings_that_are_not_offered_are_refused(stated, complaint):
    with pytest.raises(UserError, match=complaint):
        generation_settings(stated, POSITIONS)


# --- the harness's own class for transformers' models ----------------------------------------------------------------


@pytest.fixture(scope="module", params=["with BOS", "without BOS"])
def fast_folder(request, tmp_path_factory, hf_folder) -> Path:
    """The model with a byte-level tokenizer.json that puts BOS in front, as LLaMA3's does, or does not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    inner.train_from_iterator(corpus(), trainer)
    if request.param == "with BOS":
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("fast")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(hf_folder / name, folder)
    inner.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_figures_are_those_of_the_harness_own_class_for_transformers(fast_folder):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(fast_folder, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(fast_folder),
        batch_size=2,
        device="cpu",
    )
    ours = HarnessModel(accessory.load_model(str(fast_folder)), batch_size=3)
    assert theirs.max_length == ours.max_length
    # Theirs takes no context that is empty without its last spaces, as the last of PAIRS is where there is no BOS.
    pairs = instances("loglikelihood", *PAIRS[:-1], ("<s>the text", " wrapper"), (" ".join(corpus())[:2000], " lines"))
    for expected, found in zip(theirs.loglikelihood(pairs), ours.loglikelihood(pairs), strict=True):
        assert found == (pytest.approx(expected[0], rel=1e-4), expected[1])
    asked = instances("generate_until", *((prompt, {"until": ["\n", "e"], "max_gen_toks": 10}) for prompt in PROMPTS))
    assert ours.generate_until(asked) == theirs.generate_until(asked)


# --- tasks of one's own, without network -----------------------------------------------------------------------------

ITEMS = [
    {"question": f"the {words}", "options": ["text", "lines", "whitespace"], "answer": i % 3}
    for i, words in enumerate(
        ["wrapper breaks", "long", "short ones keep", "module wraps", "width of", "first line of"]
    )
]
CHOICE = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
ANSWER = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{options[answer]}}}}"
generation_kwargs:
  max_gen_toks: 8
"""


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def own_tasks_only(monkeypatch):
    """The harness's own 14,000 tasks take seconds to read."""
    monkeypatch.setattr(harness, "TaskManager", functools.partial(TaskManager, include_defaults=False))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Tasks of our own: a multiple choice, and one that answers freely."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "items.json").write_text(json.dumps(ITEMS))
    write_task(folder, "my_choice", CHOICE)
    write_task(folder, "my_answer", ANSWER)
    return folder


def write_task(folder: Path, name: str, yaml: str, **replaced: str) -> None:
    text = yaml.format(name=name, file=folder / "items.json")
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    (folder / f"{name}.yaml").write_text(text)


def settings(base: Path, **more) -> EvaluateConfig:
    return EvaluateConfig(ModelConfig(pretrained_path=[str(base)]), precision=Precision.tf32, device="cpu", **more)


def hits(model, reference) -> list[bool]:
    """Of each item whether its answer is the likeliest option, by the definition."""
    found = []
    for item in ITEMS:
        before = model.tokenizer.encode(item["question"], bos=True, eos=False)
        wholes = [model.tokenizer.encode(f"{item['question']} {o}", bos=True, eos=False) for o in item["options"]]
        scores = [score(reference, before, whole[len(before) :])[0] for whole in wholes]
        found.append(scores.index(max(scores)) == item["answer"])
    return found


def test_task_of_ones_own_runs_from_the_command_line_offline(folder, hf_folder, model, reference, monkeypatch, capsys):
    right = hits(model, reference)
    output = folder / "figures.json"
    words = f"--pretrained_path {hf_folder} --tasks my_choice --include_path {folder} --device cpu --precision tf32"
    monkeypatch.setattr("sys.argv", ["accessory-evaluate", *words.split(), "--output", str(output)])
    evaluate_main()
    found = json.loads(output.read_text())["tasks"]
    assert 0 < sum(right) < len(right)  # else a constant would do
    assert found["results"]["my_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert found["n-samples"]["my_choice"]["effective"] == len(ITEMS)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("my_choice")).split()
    assert row[:-1] == ["my_choice", "6", "0", "none", "acc", "↑", f"{sum(right) / len(right):.4f}"]


def test_limit_takes_the_first_items_and_a_text_is_measured_as_well(folder, hf_folder, model, reference):
    (folder / "text.txt").write_text("\n".join(corpus()[:40]))
    more = {"text": str(folder / "text.txt"), "seqlen": 32, "include_path": str(folder)}
    found = evaluate(settings(hf_folder, tasks=["my_choice,my_answer"], limit=4.0, **more))
    assert found["tasks"]["results"]["my_choice"]["acc,none"] == pytest.approx(sum(hits(model, reference)[:4]) / 4)
    assert found["tasks"]["results"].keys() == {"my_choice", "my_answer"}
    assert found["ppl"] == evaluate(settings(hf_folder, text=more["text"], seqlen=32))["ppl"]


def test_examples_stand_in_front_of_the_questions(folder, hf_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        HarnessModel, "generate_until", lambda self, requests: asked.extend(r.args[0] for r in requests) or [""] * 6
    )
    write_task(folder, "my_answer", ANSWER, **{"test_split: test": "test_split: test\nfewshot_split: test"})
    found = evaluate(settings(hf_folder, tasks=["my_answer"], include_path=str(folder), num_fewshot=2))
    assert found["tasks"]["n-shot"] == {"my_answer": 2}
    assert [text.count("the ") for text in asked] == [3] * 6
    assert [text.rsplit("\n\n", 1)[1] for text in asked] == [item["question"] for item in ITEMS]


def test_multimodal_model_is_asked_without_images(folder, qformer_folder, meta_folder):
    more = {"tasks": ["my_choice"], "include_path": str(folder)}
    found, language = (evaluate(settings(base, **more))["tasks"]["results"] for base in (qformer_folder, meta_folder))
    assert found == language


def test_flags_name_several_tasks(hf_folder):
    assert rewrite(["--tasks", "a,b", "c", "--limit", "3"], EVALUATE_FLAGS) == ["tasks=['a,b','c']", "limit='3'"]
    assert settings(hf_folder, tasks=["a, b", "c"]).tasks == ["a", "b", "c"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr("accessory.tools._load", lambda *_: pytest.fail("the model was read"))


def test_missing_harness_is_told_in_a_line(hf_folder, monkeypatch, no_model):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--tasks needs lm-evaluation-harness: pip install 'accessory\[eval\]'"):
        evaluate(settings(hf_folder, tasks=["my_choice"]))


def test_unknown_task_is_told_with_the_nearest(folder, hf_folder, no_model, own_tasks_only):
    with pytest.raises(UserError, match=r"--tasks my_choise: no such task \(did you mean my_choice\?\)"):
        evaluate(settings(hf_folder, tasks=["my_choise"], include_path=str(folder)))


def test_pattern_names_all_tasks_that_match(folder, own_tasks_only):
    assert harness.open_tasks(["my_*"], folder, POSITIONS)["tasks"].keys() == {"my_choice", "my_answer"}


def test_harness_own_tasks_are_known(monkeypatch):
    monkeypatch.setattr(TaskManager, "load", lambda self, names: {"tasks": {}, "groups": {}, "asked": {names[0]: 1}})
    assert harness.open_tasks(["lambada_openai", "mmlu"], None, POSITIONS)["asked"] == {"lambada_openai": 1, "mmlu": 1}


def test_task_from_the_hub_says_what_to_do_offline(folder, hf_folder, no_model, own_tasks_only):
    write_task(folder, "far", CHOICE, **{"dataset_path: json": "dataset_path: nobody/nothing"})
    with pytest.raises(UserError, match=r"task far takes its data from the .* Hub .*--include_path.*data_files"):
        evaluate(settings(hf_folder, tasks=["far"], include_path=str(folder)))


@pytest.mark.parametrize(
    ("replaced", "complaint"),
    [
        ({"items.json": "nothing.json"}, r"task bad: cannot be loaded from .*nothing\.json.*working directory"),
        ({"{{question}}": "{{question"}, r"task bad: cannot be loaded.*"),
        ({"max_gen_toks: 8": "num_beams: 4"}, r"task bad: generation_kwargs num_beams=4: not offered"),
        ({"max_gen_toks: 8": "max_gen_toks: 999"}, r"task bad: max_gen_toks=999: must be above 0 and below"),
        ({"test_split": "unsafe_code: true\ntest_split"}, r"task bad: runs code that the model writes"),
        ({"test_split": "doc_to_image: question\ntest_split"}, r"task bad: asks about images"),
    ],
)
def test_task_that_cannot_run_is_refused_before_the_model_is_read(replaced, complaint, folder, hf_folder, no_model):
    write_task(folder, "bad", ANSWER, **replaced)
    with pytest.raises(UserError, match=complaint):
        evaluate(settings(hf_folder, tasks=["bad"], include_path=str(folder)))


def test_folder_without_tasks_is_refused(tmp_path, hf_folder, no_model):
    with pytest.raises(UserError, match=r"--include_path .*nowhere: no such folder"):
        evaluate(settings(hf_folder, tasks=["x"], include_path=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--include_path .*empty: no \*\.yaml with a `task:` in it"):
        evaluate(settings(hf_folder, tasks=["x"], include_path=str(tmp_path / "empty")))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, "give one of --text FILE .* or --tasks NAMES"),
        ({"limit": 3.0, "text": "t.txt"}, "--limit are for --tasks"),
        ({"num_fewshot": -1, "tasks": ["x"]}, "--num_fewshot -1: must not be negative"),
        ({"limit": 2.5, "tasks": ["x"]}, "--limit 2.5: must be a whole number of items, or a share"),
        ({"limit": 0.0, "tasks": ["x"]}, "--limit 0.0: must be"),
        ({"side_by_side": True, "tasks": ["x"], "text": "t.txt"}, "run --tasks without it"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(given, complaint, hf_folder):
    with pytest.raises(UserError, match=complaint):
        settings(hf_folder, **given)
