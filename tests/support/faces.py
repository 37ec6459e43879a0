"""The last lines of a forked process's face (launched.py, vllm_zygote.py): it ends as the process has ended."""

from typing import Final

LAST_LINES: Final = """\
code = int(answers.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
