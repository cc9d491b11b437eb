"""Task files of lmms-eval for the tables of EVE and VILA, in their published protocols, and the functions they name.

`documents.py`: which rows of a dataset are asked, and their pictures. `prompts.py`: how they are asked. `results.py`
and `captions.py`: how answers become rows of the scorers in `evaluation/scorers/`, and scores the values of a table.
Each YAML file without a leading underscore is a task or a group; docs/evaluation.md, "Tasks", describes them.
"""
