"""Checks of settings: recipe, options, JSON, and output folder, and whether they fit the model and the data.

A check adds lines to a `Problems` list (`selfgen_ds.errors`) instead of raising its own error, so that a user reads all
problems of a stage at once. The stages follow what a check needs:

| file | needs | is run |
|---|---|---|
| `command_line.py` | the command line and the recipe file: names and types of settings | when parsing has failed |
| `options.py` | the command line of `evaluate`, `bench`, and `compare` | first |
| `settings.py` | the recipe, the DeepSpeed JSON, and the method's class | before any rank waits for another |
| `output_folder.py` | the output folder, as an earlier run left it | when the ranks know whether they share it |
| `inputs.py` | the model's configuration, then the tokenized data | before the model's weights are loaded |

What is read is refused where it is read, because only the reader knows the row: files, rows, and templates in `data/`,
complete rounds in `rounds/checks.py`, and data that a method cannot work with in its `Method.check`. `setup/prepare.py`
collects the errors of data and method with the others; those of rounds come after the weights are loaded.
"""
