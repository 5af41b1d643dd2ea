"""Gemma's special token ids, required of every tokenizer."""

PAD_ID = 0
EOS_ID = 1
BOS_ID = 2
UNK_ID = 3
MASK_ID = 4
SPECIAL_IDS = (PAD_ID, EOS_ID, BOS_ID, UNK_ID, MASK_ID)
