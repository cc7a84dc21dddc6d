"""After an out of memory the sentence names what helps: the batch's settings, or the model's."""

from model.budget import Memory
from pipeline.training.memory import advise_out_of_memory


def test_advice_after_an_out_of_memory_goes_by_whether_the_model_alone_fits() -> None:
    memory = Memory(weights=10**9, gradients=10**9, optimizer=2 * 10**9, activations=30 * 10**9, logits=2 * 10**9)
    words = advise_out_of_memory(memory, 64, 24 * 10**9)
    assert words.startswith("32.00 GB grow with train.micro_batch_sequences, now 64: lower that first")
    words = advise_out_of_memory(memory, 1, 40 * 10**9)
    assert words.startswith("32.00 GB grow with train.micro_batch_sequences, now 1: set train.recompute_activations")
    words = advise_out_of_memory(memory, 64, 3 * 10**9)
    assert words.startswith("4.00 GB are weights, gradients and moments, whatever the batch, and there are 3.00 GB")
    assert "micro_batch" not in words
