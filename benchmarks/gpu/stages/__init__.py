"""Each module is one stage: `run(settings, store, record, deadline)` fills the record and saves it as it goes.

A stage that finds something wrong with the package sets status "failed" and a reason; what it skips, it says.
"""
