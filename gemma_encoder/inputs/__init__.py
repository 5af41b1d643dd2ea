"""The ground floor: what a task, a text and a batch are. Needs only numpy and sentencepiece, so that training and inference share it."""
