"""How the cells of a run are computed. runner.py, which writes their records, is its front door.

cells, executors, ray_executor  a cell's work, wherever it is done: in this process, in workers, on Ray
quiet                           no other cell computes while a latency is measured
run_lock, run_log               one run at a time on a folder; what it did
tracking                        each cell in an experiment tracker
"""
