"The `deepfid` command as a module: `python -m deepfid`"
import sys
from . import run_command

if __name__=='__main__': sys.exit(run_command())
