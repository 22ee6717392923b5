"""tokens-demo: generated sequences, padding without influence, and that the task can be learned."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pydantic", reason="needs moeyard[train]")

from moeyard.models.tokens_demo import NO_LABEL, Sequences, TokenClassifier, TokensData, TokensDemoData, TokensModel

DATA = TokensData(sequences=40, evaluation_sequences=10, max_tokens_per_batch=64)


def test_sequences_are_the_same_wherever_they_are_made() -> None:
    first, again, other = Sequences(DATA), Sequences(DATA), Sequences(DATA.model_copy(update={"seed": 1}))
    assert len(first) == 50
    list(map(again.__getitem__, range(7)))
    for i in (7, 3, 49):
        tokens, labels = first[i]
        assert torch.equal(tokens, again[i][0])
        assert torch.equal(labels, again[i][1])
        assert DATA.shortest <= len(tokens) == int(first.lengths[i]) <= DATA.longest
    assert any(not torch.equal(first[i][0], other[i][0]) for i in range(5))


def test_labels_follow_the_dialects_table() -> None:
    sequences = Sequences(DATA)
    for i in range(50):
        tokens, labels = sequences[i]
        dialect = int(tokens[0]) - DATA.vocabulary
        assert 0 <= dialect < DATA.dialects
        assert labels[0] == NO_LABEL
        assert [sequences.table[dialect, t] for t in tokens[1:].tolist()] == labels[1:].tolist()


def test_training_and_evaluation_do_not_meet() -> None:
    data = TokensDemoData(DATA, seed=3)
    for epoch in (0, 1):
        data.training_batches.set_epoch(epoch)
        assert sorted(i for batch in data.training_batches for i in batch) == list(range(40))
    assert sorted(i for batch in data.evaluation_batches for i in batch) == list(range(40, 50))
    for batch in data.loader(data.evaluation_batches, num_workers=0):
        assert int(batch.mask.sum()) <= 64
        assert torch.equal(batch.mask.sum(1), (batch.labels != NO_LABEL).sum(1) + 1)
        assert torch.equal(batch.domain, batch.tokens[:, 0] - DATA.vocabulary)


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    data, model = TokensDemoData(DATA, seed=0), TokenClassifier(DATA, TokensModel()).double()
    (batch,) = data.loader([[1, 2, 3]], num_workers=0)
    logits, gatings = model(batch.tokens, batch.mask)
    assert int(gatings[0].counts.sum()) == 2 * int(batch.mask.sum())
    for row, index in enumerate((1, 2, 3)):
        tokens = data.sequences[index][0][None]
        alone, _ = model(tokens, torch.ones_like(tokens, dtype=torch.bool))
        torch.testing.assert_close(logits[row, : tokens.shape[1]], alone[0], rtol=1e-10, atol=1e-10)
    step = model.training_step(batch, torch.Generator())
    assert step.sizes == {"tokens": int(batch.mask.sum()), "sequences": 3}
    assert step.usage is not None
    assert step.usage.sum((0, 2)).tolist() == [
        2 * 2 * int(batch.mask[batch.domain == d].sum()) for d in range(DATA.dialects)
    ]


def test_the_task_can_be_learned() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    settings = TokensData(sequences=200, max_tokens_per_batch=512)
    data, model = TokensDemoData(settings, seed=0), TokenClassifier(settings, TokensModel())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    for epoch in range(15):
        data.training_batches.set_epoch(epoch)
        for batch in data.loader(data.training_batches, num_workers=0):
            step = model.training_step(batch, torch.Generator())
            optimizer.zero_grad()
            step.loss.backward()
            optimizer.step()
            seen.append(float(step.metrics["accuracy"]))
    # Guessing gives one in eight.
    assert seen[0] < 0.3
    assert seen[-1] > 0.95


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shortest": 9, "longest": 8}, "expected shortest <= longest <= max_tokens_per_batch, got 9, 8, 512"),
        ({"max_tokens_per_batch": 31}, "got 8, 32, 31"),
        ({"labels": 1}, "greater than or equal to 2"),
    ],
)
def test_bad_settings(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokensData.model_validate(settings)
