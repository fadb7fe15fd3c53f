"The `deepfid` command: its script, and `python -m deepfid`"
import sys

def run_command()->int:
    "Run the command; Ctrl-C is one line also while the modules of `cli` are imported"
    try:
        from .cli import main
        return main()
    except KeyboardInterrupt:
        print('deepfid: interrupted', file=sys.stderr, flush=True)
        return 130

if __name__=='__main__': sys.exit(run_command())
