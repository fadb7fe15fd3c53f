"Commands killed at random moments and run again: nothing is lost, nothing double, the end is that of a run nobody disturbed"
import json, multiprocessing, os, random, shutil, signal, time
import cv2
import pytest
from deepfid import cli

# each command runs in a process forked from one that has these, so that a kill hits its work and not its imports
PRELOADED = ['deepfid.cli', 'deepfid.data.extract', 'deepfid.evaluate.training', 'deepfid.experiments.deepfidelity',
    'deepfid.experiments.registry', 'deepfid.inference.report', 'deepfid.inference.scorer', 'deepfid.models.deepfidelity.detector',
    'deepfid.models.local_similarity.detector', 'deepfid.quality.niqe', 'deepfid.quality.serfiq', __name__]
TEMPORARY, SECONDS = '.tmp-', ('seconds', 'images_per_second', 'resumed') # differ from run to run

def small_table():
    "One detector and what every table adds: a frozen probe, shuffled labels"
    from deepfid.experiments.runner import Column, Row, Table
    from deepfid.models.deepfidelity.detector import DeepFidelity
    rows = [Row('one', DeepFidelity, dict(size=64, mapping=None, workers=1))]
    return Table('small', 'One detector', rows, lambda names: [Column('all', names[0], names[0])])

def run_command(argv, folder):
    "Run a command in this process; what it prints goes to a file each"
    from deepfid.experiments.registry import register_table
    register_table(small_table())
    for fd, name in ((1, 'printed'), (2, 'errors')): os.dup2(os.open(folder/name, os.O_CREAT|os.O_WRONLY|os.O_TRUNC), fd)
    os.environ['OMP_NUM_THREADS'] = '1'
    os.chdir(folder)
    raise SystemExit(cli.main(argv))

def begin(argv, folder):
    "Start a command"
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    folder.mkdir(exist_ok=True)
    process = context.Process(target=run_command, args=(argv, folder))
    process.start()
    return process

def without_seconds(value):
    "JSON without times, numbers rounded: how many faces share a batch changes their last digits"
    if isinstance(value, dict): return {k: without_seconds(v) for k, v in value.items() if k not in SECONDS}
    if isinstance(value, list): return [without_seconds(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value

def content(path):
    "What a file holds that two runs have in common"
    data = path.read_bytes()
    if path.name=='results.csv': return [line.rpartition(b',')[0] for line in data.splitlines()] # the last column is seconds
    if path.name=='.deepfid.json': return sorted(json.loads(data)['files'])
    if path.suffix=='.jsonl': return sorted(json.dumps(without_seconds(json.loads(line))) for line in data.splitlines()[1:])
    if path.suffix=='.json': return without_seconds(json.loads(data))
    if path.suffix in ('.html', '.md'): return data.count(b'\n')
    return data

def whole_files(folder):
    "Content by name of the files below a folder that are not marked as temporary by their own name or a folder's"
    names = (p.relative_to(folder) for p in sorted(folder.rglob('*')) if p.is_file())
    return {n.as_posix(): content(folder/n) for n in names if not any(part.startswith(TEMPORARY) for part in n.parts)}

def results(folder):
    "Names in a results file, as the package reads it"
    from deepfid.inference.results import read_results
    return [f.source for f in read_results(folder/'out'/'r.jsonl')] if (folder/'out'/'r.jsonl').exists() else []

def check_killed(folder, reference):
    "Whatever has its final name is whole; what was said to be finished is kept"
    out, state = folder/'out', folder/'state'
    lines = (folder/'printed').read_text().splitlines(keepends=True)
    said = [json.loads(line)['source'] for line in lines if line.startswith('{"source"') and line.endswith('\n')]
    kept = results(folder)
    assert set(said)<=set(kept) and len(set(kept))==len(kept)
    found = {n: c for n, c in whole_files(out).items() if not n.startswith('unfinished/')} if out.exists() else {}
    for name in found.keys()-{'r.jsonl'}:
        if name.endswith('.deepfid.json'): assert set(found[name])<=set(reference[name]) # a table adds to a saved detector
        else: assert found[name]==reference[name], name
    if (state/'training.pt').exists():
        import torch
        assert torch.load(state/'training.pt', weights_only=True)['epoch']>=1

@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    "Photographs in two classes, one of them no image; and a manifest of synthetic faces"
    from deepfid.data.london import london_faces
    from deepfid.testing import tiny_manifest
    root = tmp_path_factory.mktemp('inputs')
    for i, face in enumerate(london_faces(expressions='neutral')[:16]):
        path = root/'photos'/('fake' if i%2 else 'real')/f'p{i//2}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), face.image[..., ::-1])
    (root/'photos'/'real'/'broken.jpg').write_text('no image')
    shutil.copytree(tiny_manifest((24, 12, 12), 64).save().parent, root/'faces')
    return root

def commands(inputs):
    "Arguments and exit status by name"
    table, tiny = str(inputs/'faces'/'manifest.csv'), ['--preset', 'tiny', '--epochs']
    return dict(
        score=(['score', str(inputs/'photos'), '--results', 'out/r.jsonl', '--csv', 'out/r.csv', '--report', 'out/r.html', '--workers', '1', '--json'], 1),
        faces=(['faces', str(inputs/'photos'), '--out', 'out', '--size', '64', '--workers', '1', '--json'], 3),
        train=(['train', table, '--out', 'out', '--resume', 'state', *tiny, '4', '--size', '64', '--mapping', 'none', '--workers', '1'], 0),
        table=(['table', 'small', '--manifest', table, '--seeds', '1', *tiny, '1', '--out', 'out'], 0))

@pytest.mark.parametrize('name', ['score', 'faces', 'train', 'table'])
def test_killed_commands_lose_and_double_nothing(request, inputs, tmp_path, name):
    "SIGKILL once or twice, or twenty times with --slow"
    n, rng = 20 if request.config.getoption('--slow') else 1 if name=='table' else 2, random.Random(name)
    argv, status = commands(inputs)[name]
    undisturbed, folder = tmp_path/'undisturbed', tmp_path/'killed'
    begin(['list'], tmp_path/'warm').join()
    started = time.monotonic()
    (process := begin(argv, undisturbed)).join()
    seconds = time.monotonic()-started
    assert process.exitcode==status, (undisturbed/'errors').read_text()
    reference, killed, ended = whole_files(undisturbed/'out'), 0, 0
    while True:
        process = begin(argv, folder)
        process.join(rng.uniform(0, seconds) if killed<n else None)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
            check_killed(folder, reference)
            continue
        assert process.exitcode==status and 'Traceback' not in (folder/'errors').read_text(), (folder/'errors').read_text()
        assert whole_files(folder/'out')==reference
        ended += 1
        if killed>=n: break
        shutil.rmtree(folder)
    left = [p for p in folder.rglob(TEMPORARY+'*')]
    print(f'{name}: {killed} kills, {ended} runs to the end, {seconds:.1f} s each; left over: {len(left)}')
