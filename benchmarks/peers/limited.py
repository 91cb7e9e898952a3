"""Run a script in this process within bounds: `limited.py BYTES CPU_SECONDS SCRIPT ARGUMENT ...`; 0 for no bound.

A converter that asks for more memory than there is would take the machine with it, and one that tries a model again and
again might not end. What it says last is then that. Mapped files are not counted, as in the measurement.
"""

import os
import resource
import runpy
import signal
import sys

memory, seconds = int(sys.argv[1]), int(sys.argv[2])


def stop(*_):
    os.write(2, f"\nit took more than {seconds} CPU seconds\n".encode())
    os._exit(1)


if memory:
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
if seconds:
    signal.signal(signal.SIGXCPU, stop)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 60))
sys.argv = sys.argv[3:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
