"""Checks of the user's input: recipe, options, JSON, output folder, model, and data.

A check adds lines to a `Problems` list (`selfgen_ds.errors`) instead of raising its own error, so that a user reads all
problems of a stage at once. The stages follow what a check needs:

| file | needs | is run |
|---|---|---|
| `options.py` | the command line of `evaluate`, `bench`, and `compare` | first |
| `settings.py` | the recipe, the DeepSpeed JSON, and the method's class | before any rank waits for another |
| `output_folder.py` | the output folder, as an earlier run left it | when the ranks know whether they share it |
| `inputs.py` | the model's configuration, then the tokenized data | before the model's weights are loaded |

Readers refuse a file, row, or template that they cannot read where they read it (`data/`), because only they know the
row; `setup/prepare.py` collects those errors with the others.
"""
