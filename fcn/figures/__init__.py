"""Everything that this project draws: masks, legends, panels, curves, comparisons of runs.

The modules here only draw. They take tensors, numbers and texts, know nothing of networks, data
sets or run folders, and import only `fcn.files` from outside of this package.
"""
