"""The benchmark: `python -m bench` from the repository root, or `make bench`.

case      what a line of the table is; bench/<family>/<core>.py yield them
collect   finds them
check     values first, against float64
measure   interleaved timing
floor     what the machine can do, measured in the same run
run       one line: data, check, times; session: a whole run and its exit code
report    table, JSON, page; plot: the picture; compare: beside an earlier run
showcase  each family on real data, beside plain torch
gpu.sh    everything on a CUDA machine; every_op: what its memory checker looks at
"""
