"Nothing that the package did not write is ever removed or overwritten, by any command or function"
import argparse, json, os, shutil
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from deepfid.cli import COMMANDS, build_parser, main
from deepfid.commands import check_score_outputs
from deepfid.core import DeepfidError
from deepfid.data.manifest import Manifest
from deepfid.evaluate.report import Report
from deepfid.io import (FILE_MARK, FOLDER_KINDS, MARKER_FILE, InlineImage, atomic_folder, check_replaceable, claim_folder, mark_folder,
    replace_in_folder, write_atomically)
from deepfid.testing import tiny_manifest

def content(folder):
    "Everything below a folder: name -> bytes, or where a link leads"
    return {p.relative_to(folder).as_posix(): p.readlink() if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in sorted(Path(folder).rglob('*'))}

def photo(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    return path

@pytest.fixture(params=['folder', 'link'])
def stranger(request, tmp_path):
    "A folder with somebody's thesis and photographs, or a link to it; with a function that compares it with what it was"
    there = tmp_path/'home'/'papers'
    there.mkdir(parents=True)
    (there/'thesis.txt').write_text('years of work')
    (there/'manifest.csv').write_text('path,label\nfaces/a.png,1\n')
    photo(there/'faces'/'a.png')
    before, path = content(tmp_path/'home'), there
    if request.param=='link':
        path = tmp_path/'shortcut'
        path.symlink_to(there)
    def unchanged():
        assert content(tmp_path/'home')==before and path.is_symlink()==(request.param=='link')
    return path, unchanged

def refused(capsys, argv, *words):
    "A command ends with one line and a status that is not zero"
    capsys.readouterr()
    status = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith('deepfid: ')]
    assert status not in (0, None) and not out and len(lines)==1 and 'Traceback' not in err, (out, err)
    assert all(w in lines[0] for w in words), lines[0]

# -- commands: every option that names an output, by the words before it ------------------------------------------------

FOLDER_COMMANDS = {('train', '--out'): ['train', 'gone.csv'], ('demo', '--out'): ['demo'], ('faces', '--out'): ['faces', '{videos}'],
    ('synth', '--out'): ['synth'], ('forge', '--out'): ['forge', '{videos}']}
FILE_COMMANDS = {('score', '--csv'): (['score', 'gone.jpg'], '.csv'), ('score', '--report'): (['score', 'gone.jpg'], '.html'),
    ('score', '--results'): (['score', 'gone.jpg'], '.jsonl'), ('evaluate', '--html'): (['evaluate', 'deepfidelity', 'gone.csv'], '.html'),
    ('evaluate', '--png'): (['evaluate', 'deepfidelity', 'gone.csv'], '.png'), ('export', '--out'): (['export', 'deepfidelity', '--format', 'onnx'], '.onnx'),
    ('figure', '--out'): (['figure', 'attention'], '.png'),
    ('maps', '--out'): (['maps', 'gone.jpg', '--detector', 'deepfidelity'], '.jpg')}
OTHER_COMMANDS = {('train', '--resume'), ('table', '--out'), ('notebooks', 'folder'), ('score', '--explain'), ('quality', 'out')} # tests of their own, below
INPUTS = {('forge', 'source')}

def test_every_output_of_every_command_is_tried():
    found = set()
    for name in COMMANDS:
        subparsers = next(a for a in build_parser(name)._actions if isinstance(a, argparse._SubParsersAction))
        found |= {(name, (a.option_strings or [a.dest])[0]) for a in subparsers.choices[name]._actions if a.type is Path}
    assert found==set(FOLDER_COMMANDS)|set(FILE_COMMANDS)|OTHER_COMMANDS|INPUTS

@pytest.mark.parametrize('command, option', FOLDER_COMMANDS)
def test_commands_leave_a_folder_alone(capsys, tmp_path, stranger, command, option):
    path, unchanged = stranger
    photo(tmp_path/'videos'/'real'/'a.png')
    photo(tmp_path/'videos'/'fake'/'b.png', 1)
    argv = [a.format(videos=tmp_path/'videos') for a in FOLDER_COMMANDS[command, option]]
    refused(capsys, [*argv, option, path], 'name ', 'folder', 'papers' if path.name=='papers' else '')
    unchanged()

@pytest.mark.parametrize('link', [False, True])
@pytest.mark.parametrize('command, option', FILE_COMMANDS)
def test_commands_leave_a_file_alone(capsys, tmp_path, command, option, link):
    argv, suffix = FILE_COMMANDS[command, option]
    theirs = tmp_path/'theirs'/f'work{suffix}'
    theirs.parent.mkdir()
    if suffix in ('.png', '.jpg'): photo(theirs)
    else: theirs.write_text('a,b\n1,2\n')
    before, path = content(tmp_path/'theirs'), theirs
    if link:
        path = tmp_path/f'link{suffix}'
        path.symlink_to(theirs)
    refused(capsys, [*argv, option, path], 'not written by deepfid', 'name another file')
    assert content(tmp_path/'theirs')==before
    refused(capsys, [*argv, option, photo(tmp_path/'theirs'/'other.bmp')], 'other.bmp', 'name another file')

@pytest.mark.parametrize('command, option', FILE_COMMANDS)
def test_commands_leave_a_pipe_alone(capsys, tmp_path, command, option):
    argv, suffix = FILE_COMMANDS[command, option]
    os.mkfifo(path := tmp_path/f'pipe{suffix}')
    refused(capsys, [*argv, option, path], 'is a pipe or a device', 'name another file')
    assert path.is_fifo()

def test_table_and_notebooks_leave_files_alone(capsys, tmp_path):
    for name in ('table-ablation.json', 'table-ablation.md', 'table-ablation.svg', 'explorers.ipynb'):
        folder = tmp_path/name.replace('.', '-')
        folder.mkdir()
        (folder/name).write_text('{"my": "own"}')
        if name.startswith('table'): refused(capsys, ['table', 'ablation', '--manifest', 'gone.csv', '--out', folder], name, 'not written by deepfid')
        else: refused(capsys, ['notebooks', folder], 'exists already')
        assert content(folder)=={name: b'{"my": "own"}'}

@pytest.mark.parametrize('argv', [['notebooks', '{}'], ['table', 'ablation', '--manifest', 'synthetic', '--out', '{}'], ['score', '{}/thesis.png', '--explain', '{}']])
def test_files_of_somebody_are_not_mixed_with_ours(capsys, tmp_path, argv):
    photo(tmp_path/'papers'/'thesis.png')
    before = content(tmp_path)
    refused(capsys, [a.format(tmp_path/'papers') for a in argv], 'papers', 'folder')
    assert content(tmp_path)==before

def test_explanations_are_added_to_earlier_ones(capsys, tmp_path):
    from deepfid.data.london import london_faces
    face = photo(tmp_path/'a.png')
    Image.fromarray(london_faces(expressions='neutral')[0].image).save(face)
    for _ in range(2): assert main(['score', str(face), '--explain', str(tmp_path/'out'/'ex')])==0
    assert len(list((tmp_path/'out'/'ex').glob('*.jpg')))==1

def test_a_page_that_was_edited_is_not_replaced(tmp_path):
    page = tmp_path/'p.html'
    for _ in range(2): Report('one \udce9', kind='scores').save(page)
    ours = page.read_bytes()
    for edited in (ours+b'<p>mine', ours.replace(b'one', b'two'), ours.replace(b'<!-- sha256', b'<p>mine</p><!-- sha256')):
        page.write_bytes(edited)
        with pytest.raises(DeepfidError, match='p.html: exists already and was changed since deepfid wrote it'): Report('three', kind='scores').save(page)
        assert page.read_bytes()==edited

def test_columns_that_somebody_added_are_kept(capsys, tmp_path):
    m, path = tiny_manifest((8, 4, 4), 64), tmp_path/'m.csv'
    for _ in range(2): m.save(path)
    larger = Manifest(m.table.assign(score=.5), m.folder)
    for _ in range(2): larger.save(path) # has all columns of the one before
    with pytest.raises(DeepfidError, match='m.csv: exists already'): m.save(path)
    for i in range(3): photo(tmp_path/'crops'/f'{i}.png', i)
    argv = ['quality', tmp_path/'crops', tmp_path/'q.csv']
    assert main([str(a) for a in argv])==0
    text = (tmp_path/'q.csv').read_text()
    (tmp_path/'q.csv').write_text(''.join(f'{line},my note\n' for line in text.splitlines()))
    before = content(tmp_path)
    refused(capsys, argv, 'q.csv', 'exists already')
    assert content(tmp_path)==before

def test_quality_leaves_files_alone(capsys, tmp_path):
    for i in range(3): photo(tmp_path/'crops'/f'{i}.png', i)
    theirs = tmp_path/'theirs.csv'
    theirs.write_text('path,label,quality\na.png,1,2\n')
    before = content(tmp_path)
    refused(capsys, ['quality', tmp_path/'crops', theirs], 'theirs.csv', 'not written by deepfid')
    refused(capsys, ['quality', theirs, theirs], 'theirs.csv', 'input or output')
    refused(capsys, ['quality', tmp_path/'crops', tmp_path/'crops'/'0.png'], '0.png', 'does not end in .csv')
    refused(capsys, ['quality', tmp_path/'crops', theirs/'q.csv'], 'theirs.csv', 'cannot be written')
    assert content(tmp_path)==before
    for _ in range(2): assert main(['quality', str(tmp_path/'crops'), str(tmp_path/'q.csv')])==0 # what it wrote itself it replaces

def test_a_report_is_replaced_by_one_of_its_kind_only(tmp_path):
    for kind, text in {'page': 'one', 'scores': 'two'}.items(): Report(text, kind=kind).save(tmp_path/f'{kind}.html')
    Report('again', kind='scores').save(tmp_path/'scores.html')
    with pytest.raises(DeepfidError, match='page.html: exists already and is another result of deepfid'): check_score_outputs(report=tmp_path/'page.html')
    with pytest.raises(DeepfidError, match='another result of deepfid'): Report('x', kind='evaluation').save(tmp_path/'scores.html')
    before = f'<meta name="generator" content="{FILE_MARK.decode()}">' # of version 0.1
    (tmp_path/'old.html').write_text(before)
    Report('new', kind='scores').save(tmp_path/'old.html')
    (tmp_path/'thesis.html').write_text('a thesis on pages written by deepfid')
    for name in ('thesis.html', 'page.html'):
        with pytest.raises(DeepfidError, match='exists already'): Report('x', kind='scores').save(tmp_path/name)
    (tmp_path/'mine.jsonl').write_text('about {"deepfid": 1}\n')
    (tmp_path/'mine.csv').write_text('notes\nsource,kind,face,\n')
    for option in ('results', 'csv'):
        file = next(tmp_path.glob(f'mine.{"jsonl" if option=="results" else "csv"}'))
        with pytest.raises(DeepfidError, match='was not written by deepfid'): check_score_outputs(**{option: file})

def test_a_folder_is_no_file(tmp_path):
    for write in (lambda: write_atomically(tmp_path, b'x'), lambda: tiny_manifest((8, 4, 4), 64).save(tmp_path)):
        with pytest.raises(DeepfidError, match='is a folder; name a file'): write()

def test_the_second_file_of_openvino_is_left_alone(capsys, tmp_path):
    (tmp_path/'m.bin').write_bytes(b'years of work')
    refused(capsys, ['export', 'deepfidelity', '--format', 'openvino', '--out', tmp_path/'m.xml'], 'm.bin', 'not written by deepfid')
    assert content(tmp_path)=={'m.bin': b'years of work'}

# -- functions ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def detector():
    from deepfid.models.deepfidelity.detector import DeepFidelity
    return DeepFidelity(mapping=None, seed=3).configure('tiny')

@pytest.fixture(scope='module')
def manifest(tmp_path_factory):
    from deepfid.data.pairs import build_pairs, synthetic_sources
    return build_pairs(synthetic_sources(12, 2, 900), tmp_path_factory.mktemp('f')/'faces', pairs=12, size=32, workers=1)

def _extract(folder, tmp_path):
    from deepfid.data.extract import extract_dataset
    photo(tmp_path/'videos'/'real'/'a.png')
    photo(tmp_path/'videos'/'fake'/'b.png', 1)
    extract_dataset(tmp_path/'videos', folder, workers=1, progress=False)

def _pairs(folder, tmp_path):
    from deepfid.data.pairs import build_pairs, synthetic_sources
    build_pairs(synthetic_sources(12, 2, 900), folder, pairs=12, size=32, workers=1)

def _training_state(folder, tmp_path):
    from deepfid.models.callbacks import Checkpoint
    Checkpoint(folder, dict(seed=1))

def _demo(folder, tmp_path):
    from deepfid.experiments.demo import run_demo
    run_demo(out=folder, pairs=8, epochs=1)

@pytest.mark.parametrize('write', [_extract, _pairs, _training_state, _demo])
def test_functions_leave_a_folder_alone(tmp_path, stranger, write):
    path, unchanged = stranger
    with pytest.raises(DeepfidError, match='papers.*holds .*another folder|shortcut.*holds .*another folder'): write(path, tmp_path)
    unchanged()

@pytest.mark.parametrize('half', [False, True])
def test_saving_a_detector_leaves_a_folder_alone(stranger, detector, half):
    path, unchanged = stranger
    with pytest.raises(DeepfidError, match='papers: holds .*, which was not written by deepfid; nothing is replaced'): detector.save(path, half)
    unchanged()

def test_transformed_copies_and_videos_leave_a_folder_alone(stranger, manifest):
    from deepfid.data.pairs import map_images
    from deepfid.experiments.conditions import synthetic_video_set
    path, unchanged = stranger
    with pytest.raises(DeepfidError): map_images(manifest, lambda a: a, path) # a manifest is there: another's
    with pytest.raises(DeepfidError): map_images(manifest, lambda a: a, path/'faces')
    with pytest.raises(DeepfidError): synthetic_video_set(path/'faces', (1, 1, 1), 2, 32)
    unchanged()

@pytest.mark.parametrize('name', ['page.html', 'table.csv', 'list.json', 'clip.mp4', 'quality.safetensors', 'embedder.safetensors',
    'regressor.json', 'regressor.safetensors', 'manifest.csv', 'record.json', 'image.jpg', 'network.pt2', 'figure.svg'])
def test_functions_leave_a_file_alone(tmp_path, name, manifest, detector):
    from deepfid.commands import save_figure
    from deepfid.data.datasets import write_deepfakebench
    from deepfid.data.video import write_video
    from deepfid.evaluate.report import Report
    from deepfid.export import export_graph
    from deepfid.inference.results import write_csv
    from deepfid.models.deepfidelity.regressor import FidelityRegressor
    from deepfid.plotting import new_figure
    from deepfid.quality.niqe import load_niqe
    from deepfid.quality.serfiq import save_embedder
    from deepfid.testing import record_result
    import torch
    path, image = tmp_path/name, np.zeros((32, 32, 3), np.uint8)
    path.write_bytes(b'years of work')
    def regressor(_): FidelityRegressor().fit(np.random.default_rng(0).normal(size=(20, 3)), np.linspace(0, 1, 20)).save(tmp_path)
    write = dict(page=lambda p: Report('a', 'b').save(p), table=lambda p: write_csv(p, []), list=lambda p: write_deepfakebench(manifest, p),
        clip=lambda p: write_video([image]*3, p), quality=lambda p: load_niqe('synth').save(p), embedder=lambda p: save_embedder(torch.nn.Linear(2, 2), p),
        regressor=regressor, manifest=manifest.save, record=lambda p: record_result('record', tmp_path, config={}, data='', seed=0, seconds=1., metrics={}),
        image=lambda p: InlineImage(image).save(p), network=lambda p: export_graph(detector, p), figure=lambda p: save_figure(new_figure()[0], p))[path.stem]
    with pytest.raises(DeepfidError, match=f'{name}: exists already and was not written by deepfid; name another file'): write(path)
    assert path.read_bytes()==b'years of work'
    path.unlink()
    for _ in range(2): write(path) # what it wrote itself it replaces

def test_explanations_leave_a_file_alone(tmp_path):
    from deepfid.commands import save_explanations
    from deepfid.inference.results import ScoredFace, ScoredFile
    uri = InlineImage(np.zeros((32, 32, 3), np.uint8)).data_uri()
    file = ScoredFile('a.jpg', faces=[ScoredFace(1, images={'face': uri, 'lisiam: mask': uri})])
    [path] = save_explanations(file, tmp_path)
    assert save_explanations(file, tmp_path)==[path] # what it wrote itself it replaces
    path.write_bytes(b'years of work')
    with pytest.raises(DeepfidError, match='not written by deepfid'): save_explanations(file, tmp_path)
    assert content(tmp_path)=={path.name: b'years of work'}

# -- what may be replaced -------------------------------------------------------------------------------------------------

def save(folder, text='1'):
    with atomic_folder(folder, 'saved detector') as tmp:
        (tmp/'detector.json').write_text(json.dumps(dict(detector=text)))
        (tmp/'regressor').mkdir()
        (tmp/'regressor'/'regressor.json').write_text(text)

def saved(folder): return (folder/'regressor'/'regressor.json').read_text()

def test_an_unchanged_result_of_the_same_kind_is_replaced(tmp_path):
    save(tmp_path/'m')
    save(tmp_path/'m', '2')
    shutil.copytree(tmp_path/'m', tmp_path/'copy')
    (tmp_path/'copy'/'regressor'/'regressor.json').unlink()
    (tmp_path/'copy'/'.tmp-0123456789ab-detector.json').write_text('left by a process that was killed')
    save(tmp_path/'copy', '3')
    (tmp_path/'link').symlink_to(tmp_path/'m')
    save(tmp_path/'link', '4')
    assert saved(tmp_path/'m')=='4' and saved(tmp_path/'copy')=='3' and (tmp_path/'link').is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir())==['copy', 'link', 'm']

@pytest.mark.parametrize('change, words', [
    (lambda f: (f/'notes.txt').write_text('x'), 'holds notes.txt, which was not written'),
    (lambda f: (f/'regressor'/'mine').mkdir(), 'holds regressor/mine, which was not written'),
    (lambda f: (f/'detector.json').write_text('{"detector": "edited"}'), 'holds detector.json, which was changed since'),
    (lambda f: ((f/'detector.json').unlink(), (f/'detector.json').symlink_to('/etc/hosts')), 'holds detector.json, which was changed'),
    (lambda f: mark_folder(f, 'set of faces'), 'holds a set of faces, not a saved detector'),
    (lambda f: (f/MARKER_FILE).write_text('{"kind": ["saved detector"], "files": 3}'), f'holds {MARKER_FILE}'),
    (lambda f: (f/MARKER_FILE).write_text('{"kind": "saved detector", "files": 3}'), f'holds {MARKER_FILE}'),
    (lambda f: (shutil.rmtree(f), f.write_text('x')), 'is a file')])
def test_a_changed_result_is_not_replaced(tmp_path, change, words):
    save(tmp_path/'m')
    change(tmp_path/'m')
    before = content(tmp_path)
    with pytest.raises(DeepfidError, match=words): save(tmp_path/'m', '2')
    assert content(tmp_path)==before

def test_a_folder_without_a_marker_may_be_anybodys(tmp_path, repo):
    "Also one with files that are named as ours are, such as a copy of a bundled detector with notes in its card"
    shutil.copytree(repo/'deepfid'/'weights'/'detectors'/'lisiam', tmp_path/'copy')
    with (tmp_path/'copy'/'MODEL_CARD.md').open('a') as f: f.write('my notes')
    for kind, name, text in (('saved detector', 'detector.json', '{"detector": "smoke"}'), ('demonstration', 'summary.json', '{"auc": 0.93}'), ('training state', 'training.json', '{"seed": 1}'), ('extraction', 'crop_config.json', '{"size": 112}')):
        (tmp_path/kind).mkdir()
        (tmp_path/kind/name).write_text(text)
        for check in (check_replaceable, claim_folder):
            with pytest.raises(DeepfidError, match=f'{name}, which was not written by deepfid'): check(tmp_path/kind, kind)
    with pytest.raises(DeepfidError, match='which was not written by deepfid'): check_replaceable(tmp_path/'copy', 'saved detector')

def test_files_of_a_claimed_folder_that_somebody_changed_are_left_alone(tmp_path):
    folder = claim_folder(tmp_path/'f', 'extraction')
    for text in ('one', 'two'): replace_in_folder(folder, 'extraction', {'a.csv': text, 'b.csv': text}) # its own it replaces
    (folder/MARKER_FILE).write_text(json.dumps(dict(kind='extraction', files={})))
    replace_in_folder(folder, 'extraction', {'a.csv': 'two', 'b.csv': 'two'}) # so does a run after one that was killed before it marked them
    (folder/'b.csv').write_text('checked by hand')
    with pytest.raises(DeepfidError, match='b.csv: was changed since deepfid wrote it'): replace_in_folder(folder, 'extraction', {'a.csv': 'three', 'b.csv': 'three'})
    (folder/'c.csv').write_text('mine')
    with pytest.raises(DeepfidError, match='c.csv: was not written by deepfid'): replace_in_folder(folder, 'extraction', {'c.csv': 'three'})
    assert {p.name: p.read_text() for p in folder.glob('*.csv')}=={'a.csv': 'two', 'b.csv': 'checked by hand', 'c.csv': 'mine'}

def test_a_manifest_is_saved_over_a_manifest_only(tmp_path):
    (tmp_path/'thesis.txt').write_text('on the label of faces')
    with pytest.raises(DeepfidError, match='thesis.txt: exists already'): tiny_manifest((8, 4, 4), 64).save(tmp_path/'thesis.txt')
    typed = 'path,label,identity,split\nphoto.jpg,1,anna,train\n' # by hand: what is saved has all columns
    (tmp_path/'typed.csv').write_text(typed)
    with pytest.raises(DeepfidError, match='typed.csv: exists already'): tiny_manifest((8, 4, 4), 64).save(tmp_path/'typed.csv')
    assert (tmp_path/'typed.csv').read_text()==typed
    for _ in range(2): tiny_manifest((8, 4, 4), 64).save(tmp_path/'m.csv')

@pytest.mark.parametrize('name, text', [('scores.csv', 'source,kind,face,mine\n1,2,3,4\n'), ('results.csv', 'epoch,time,train/box_loss\n1,2,3\n'),
    ('quality.csv', 'file,note\na.jpg,the quality_measure that I like\n'), ('london.zip', 'a thesis')])
def test_tables_of_others_that_resemble_ours_are_left_alone(capsys, tmp_path, monkeypatch, name, text):
    from deepfid.evaluate.training import save_training_record
    from deepfid.inference.results import write_csv
    (tmp_path/name).write_text(text)
    photo(tmp_path/'photos'/'a.png')
    if name=='quality.csv': refused(capsys, ['quality', tmp_path/'photos', tmp_path/name], 'quality.csv: exists already')
    else:
        from deepfid.data import datasets, london
        monkeypatch.setattr(datasets, 'london', lambda root: [])
        monkeypatch.setattr(datasets, 'london_info', lambda root: {})
        monkeypatch.setattr(london, '_mean_aligned_shape', lambda faces: [])
        write = {'scores.csv': lambda p: write_csv(p, []), 'london.zip': london.build_london_archive,
            'results.csv': lambda p: save_training_record([dict(epoch=1, train_loss=.5, valid_loss=.4, valid_auc=.6)], tmp_path)}[name]
        with pytest.raises(DeepfidError, match=f'{name}: exists already'): write(tmp_path/name)
        assert (tmp_path/name).read_text()==text
        (tmp_path/name).unlink()
        for _ in range(2): write(tmp_path/name) # one of ours is replaced
        return
    assert (tmp_path/name).read_text()==text

def test_an_error_of_writing_names_the_file(tmp_path, monkeypatch):
    import errno
    def full(*args): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError) as e: write_atomically(tmp_path/'page.html', 'text')
    assert e.value.filename==str(tmp_path/'page.html') and not list(tmp_path.iterdir())

def test_checksums_and_records_of_a_training_leave_files_alone(tmp_path):
    from deepfid.evaluate.training import save_training_record
    from deepfid.inference.hub import write_checksums
    for name in ('SHA256SUMS', 'results.csv'): (tmp_path/name).write_text('mine')
    (tmp_path/'detector.json').write_text('{}') # or else the folder is none of a detector
    before = content(tmp_path)
    for write in (lambda: write_checksums(tmp_path), lambda: save_training_record([dict(epoch=1, train_loss=.5, valid_loss=.4, valid_auc=.6)], tmp_path)):
        with pytest.raises(DeepfidError): write()
    assert content(tmp_path)==before

def test_copies_by_another_transform_are_not_read(tmp_path):
    from deepfid.data.pairs import map_images
    m = tiny_manifest((8, 4, 4), 64)
    def darker(image): return image//2
    def lighter(image): return 255-image//2
    assert map_images(m, darker, tmp_path/'copy').key()==map_images(m, darker, tmp_path/'copy').key()
    with pytest.raises(DeepfidError, match='by another transform'): map_images(m, lighter, tmp_path/'copy')

def test_added_files_belong_to_the_result_only_when_listed(tmp_path):
    save(tmp_path/'m')
    write_atomically(tmp_path/'m'/'trained.json', '{}')
    with pytest.raises(DeepfidError, match='trained.json'): save(tmp_path/'m')
    mark_folder(tmp_path/'m', 'saved detector', ['trained.json'])
    save(tmp_path/'m', '2')
    assert saved(tmp_path/'m')=='2' and not (tmp_path/'m'/'trained.json').exists()

def test_a_file_added_while_the_result_was_made_is_kept(tmp_path):
    save(tmp_path/'m')
    with pytest.raises(DeepfidError, match='late.txt'):
        with atomic_folder(tmp_path/'m', 'saved detector') as tmp:
            (tmp/'detector.json').write_text('{}')
            (tmp_path/'m'/'late.txt').write_text('x')
    assert saved(tmp_path/'m')=='1' and (tmp_path/'m'/'late.txt').exists() and len(list(tmp_path.iterdir()))==1

def test_a_claimed_folder_stays_claimed(tmp_path):
    for kind in FOLDER_KINDS:
        folder = tmp_path/kind
        claim_folder(folder, kind)
        (folder/'result').write_text('x')
        claim_folder(folder, kind)
        with pytest.raises(DeepfidError, match=f'holds a {kind}'): claim_folder(folder, next(k for k in FOLDER_KINDS if k!=kind))

def test_the_marker_does_not_disturb_loading_or_checksums(tmp_path, detector):
    from deepfid.inference.hub import load, verify_checksums, write_checksums
    detector.save(tmp_path/'m')
    assert (tmp_path/'m'/MARKER_FILE).is_file()
    write_checksums(tmp_path/'m')
    verify_checksums(tmp_path/'m')
    assert MARKER_FILE not in (tmp_path/'m'/'SHA256SUMS').read_text()
    mark_folder(tmp_path/'m', 'saved detector', ['SHA256SUMS'])
    assert load(tmp_path/'m').name=='deepfidelity'
    detector.save(tmp_path/'m')

def test_marked_images_are_images(tmp_path):
    from deepfid.commands import save_figure
    from deepfid.plotting import new_figure
    for suffix in ('.jpg', '.jpeg', '.png', '.svg', '.pdf'):
        for _ in range(2): save_figure(new_figure()[0], tmp_path/f'a{suffix}')
        assert FILE_MARK in (tmp_path/f'a{suffix}').read_bytes(), suffix
    assert InlineImage(np.zeros((8, 8))).jpeg()==InlineImage(np.zeros((8, 8))).jpeg(b'')
