"""The Slurm executor: arrays of jobs that survive what clusters do to them.

``cluster`` is a cluster as validated data, ``arrays`` decides what is submitted together,
``attempts`` what is tried again, ``scheduler`` talks to Slurm, ``submissions`` keeps what was
submitted, ``launcher`` ties them together, and ``task`` is what runs inside a job.
"""
