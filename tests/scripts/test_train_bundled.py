"""The bundled model's training: generators say what they promise, rows repeat, gates count answers, resuming changes
nothing.
"""

import gzip
import json
from pathlib import Path
from random import Random

import jax
import numpy as np
import pytest

from jaxserve.checkpoint import load_model
from jaxserve.models import Model, model_config_from_hf
from scripts.bundled.corpus import read_corpus
from scripts.bundled.curriculum import CURRICULA, Stage
from scripts.bundled.data import batches, encode
from scripts.bundled.evaluate import CELLS, make_predict, recall, task_batches, verdicts
from scripts.bundled.facts import RELATIONS, Lexicon, draw_facts
from scripts.bundled.prepare import Prepared, prepare
from scripts.bundled.release import measure, release
from scripts.bundled.tasks import ANSWER, TASKS, Span
from scripts.bundled.trainer import Trainer
from scripts.train_bundled import hf_config

VOCABULARY = 420
STAGES = (
    Stage("first", 32, 3, {"rand": 0.5, "restate": 0.5}, rows=2),
    Stage("second", 64, 3, {"kv": 0.5, "text": 0.3, "talk": 0.2}, rows=2),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = Random(0)
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(60)]

    def story() -> str:
        return " ".join(f"The {' '.join(rng.choices(words, k=6))} sat down." for _ in range(30))

    talk = "User: Hello there, you.\nAssistant: Good day to you."
    for name in ("kids_stories", "books", "expository", "dialogues"):
        texts = [talk if name == "dialogues" else f"{story()}\n\n{story()}" for _ in range(50)]
        with gzip.open(folder / f"{name}.txt.gz", "wt") as file:
            file.write("".join(f"{text}\n<|endoftext|>\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(corpus, tmp_path_factory.mktemp("work") / "tokenizer.json", VOCABULARY)


@pytest.fixture(scope="module")
def model(prepared: Prepared) -> Model:
    config = hf_config(
        prepared.tokenizer.get_vocab_size(), hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=32
    )
    return Model.from_config(model_config_from_hf(config), "float32")


def test_missing_corpus_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="kids_stories.txt.gz is missing"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("stage", [s for stages in CURRICULA.values() for s in stages], ids=lambda s: s.name)
def test_curriculum_names_tasks_that_exist(stage: Stage) -> None:
    assert set(stage.mix) <= {*TASKS, "rand"}
    assert {gate.task for gate in stage.gates} <= set(stage.mix)
    assert stage.rows * stage.length == 2048


@pytest.mark.parametrize("task", TASKS)
def test_encoding_is_the_whole_text_s_and_keeps_answers_apart(task: str, prepared: Prepared) -> None:
    world = prepared.test_world(STAGES[0])
    for seed in range(5):
        spans = TASKS[task](Random(seed), world, 200)
        ids, weights, answers = encode(prepared.tokenizer, spans, 10**9)
        assert ids == prepared.tokenizer.encode("".join(span.text for span in spans)).ids
        assert len(ids) == len(weights) == len(answers)
        for span in spans:
            if span.answer:
                own = [i for i, number in zip(ids, answers, strict=True) if number == span.answer]
                assert prepared.tokenizer.decode(own, skip_special_tokens=False).strip() == span.text.strip()


def test_an_answer_that_was_cut_is_no_answer(prepared: Prepared) -> None:
    spans = [Span("one two three", 0.05), Span(" abc abd", ANSWER, 1)]
    whole = encode(prepared.tokenizer, spans, 100)
    cut = encode(prepared.tokenizer, spans, len(whole[0]) - 1)
    assert max(whole[2]) == 1 and max(cut[2]) == 0


@pytest.mark.parametrize("task", ["kv", "needle", "hop", "var"])
def test_answers_are_told_before_they_are_asked(task: str, prepared: Prepared) -> None:
    world = prepared.test_world(STAGES[0])
    for seed in range(20):
        before = ""
        answers = 0
        for span in TASKS[task](Random(seed), world, 300):
            if span.weight == ANSWER:
                words = span.text.removesuffix("<|im_end|>").replace(".", " ").replace(",", " ").split()
                assert words[-1] in before or words[-2] in before
                answers += 1
            before += span.text
        assert answers


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda r: r.name)
def test_facts_have_different_keys_before_their_values(relation, prepared: Prepared) -> None:
    facts = draw_facts(Random(1), Lexicon(prepared.words.seen), relation, 10, one_template=False)
    assert len({fact.key for fact in facts}) == len(facts) > 5
    for fact in facts:
        before, value, _ = fact.parts()
        assert fact.key in before and value.strip() == fact.value and fact.key in fact.question(Random(0))


def test_unseen_words_are_apart(prepared: Prepared) -> None:
    assert prepared.words.unseen and not set(prepared.words.seen) & set(prepared.words.unseen)


def test_rows_depend_on_seed_and_step_alone(prepared: Prepared) -> None:
    source = prepared.source(STAGES[1], "7")
    whole = batches(source, 2, 0)
    later = batches(source, 2, 2)
    next(whole), next(whole)
    np.testing.assert_equal(next(whole), next(later))
    other = prepared.source(STAGES[1], "8")[0]["tokens"]
    assert other.shape == (64,) and not np.array_equal(other, source[0]["tokens"])


def test_recall_counts_whole_answers(prepared: Prepared) -> None:
    world = prepared.test_world(STAGES[1])
    rows = task_batches(prepared.tokenizer, world, "kv", 64, 8, "x")
    answers = [row["answers"] for batch in rows for row in [batch]]

    def all_right(_, tokens):
        return np.roll(np.asarray(tokens), -1, axis=1)

    def one_token_wrong(_, tokens):
        result = all_right(_, tokens)
        first = np.argmax(answers[0][0] > 0)
        if np.array_equal(tokens, rows[0]["tokens"]):
            result[0, first - 1] += 1
        return result

    whole = recall(all_right, {}, rows)
    assert whole.right == whole.answers > 4 and whole.token_share == 1.0
    wrong = recall(one_token_wrong, {}, rows)
    assert wrong.right == whole.answers - 1 and wrong.right_tokens == whole.right_tokens - 1


def test_verdicts_average_both_formats() -> None:
    records = [
        {"task": "needle", "format": style, "tokens": 1024, "share": share}
        for style, share in (("qa", 0.95), ("chat", 0.83))
    ]
    assert verdicts(records) == [{"task": "needle", "tokens": 1024, "wanted": 0.9, "reached": 0.89, "passed": False}]


def test_resuming_gives_the_same_parameters_and_a_release_loads(
    model: Model, prepared: Prepared, corpus: Path, tmp_path: Path
) -> None:
    def trainer(folder: str) -> Trainer:
        return Trainer(model, prepared, STAGES, 0, tmp_path / folder, gate_every=2, say=lambda _: None)

    whole = trainer("whole").run()
    trainer("parts").run(stop_after=2)
    trainer("parts").run(stop_after=2)
    parts = trainer("parts").run()
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    start = model.init(jax.random.key(0))
    assert not np.array_equal(start["embedding"]["table"], whole.params["embedding"]["table"])

    measured = measure(model, whole.params, prepared, 1, "t", (64,), CELLS[:2])
    release(model, whole.params, prepared, corpus, tmp_path / "out", measured, "A test.")
    assert json.loads((tmp_path / "out" / "recall.json").read_text())["recall"]
    loaded, params = load_model(tmp_path / "out", "float32")
    assert loaded.config.max_position == 4096
    tokens = np.arange(10, 20, dtype=np.int32)[None]
    assert np.asarray(make_predict(loaded)(params, tokens)).shape == (1, 10)
    assert "64" in (tmp_path / "out" / "README.md").read_text()
