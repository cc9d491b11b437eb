"""Scorers of benchmarks: pure functions from rows of answers and labels to scores, in each benchmark's published rule.

`vqa.py`: VQAv2, VizWiz, TextVQA and OK-VQA, with `answer_processor.py`. `pope.py`, `mme.py`. `exact.py`: ScienceQA,
SEED, GQA, MMLU and BBH. `circular.py`: MMBench. `scores.py` has what they share. Nothing here opens a file, a model or
a dataset: whoever does makes the rows. A row's answer is None if the model gave none (its picture could not be
decoded, its prompt is too long): it is scored as wrong and counted in `left_out`.
"""
