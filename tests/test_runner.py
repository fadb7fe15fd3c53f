"Experiment tables: what is trained, cached, measured, recorded and formatted, and how the command runs them"
import json
from functools import partial
import numpy as np
import pytest
from deepfid import cli
from deepfid.core import DataMissingError, DeepfidError, Detector, Prediction
from deepfid.data.manifest import Manifest
from deepfid.evaluate.metrics import MetricError, auc, average_over_seeds, score_face_mask
from deepfid.experiments.registry import get_figure, get_table, list_figures, list_tables
from deepfid.experiments.records import RecordReader, read_record, significance, upgrade_record
from deepfid.experiments.runner import (Row, Column, Table, TableRun, cache_key, mean_mask_baseline, mean_training_mask, run_tables, score_test_faces)
from deepfid.experiments.markdown import comparison_table, markdown_table, record_markdown
from deepfid.experiments.provenance import describe_code, source_hash
from deepfid.testing import tiny_manifest

calls = []
class DetailDetector(Detector):
    "How much detail there is, and some noise"
    name = 'test_detail'
    def __init__(self, seed=0, noise=0., epochs=None):
        self.rng, self.noise, self.threshold = np.random.default_rng(seed), noise, 5.
    def fit(self, manifest, preset=None, recipe='ours', cbs=None):
        calls.append(('fit', self.noise))
        return self
    def predict(self, faces, batch_size=32):
        detail = [np.abs(np.diff(f.astype(float), axis=1)).mean() for f in faces]
        return [Prediction(d+self.noise*self.rng.normal()) for d in detail]
    def refit(self, manifest, noise):
        calls.append(('refit', noise))
        return DetailDetector(1, noise)

class SavedDetector(DetailDetector):
    name = 'test_saved'
    def save(self, folder): folder.mkdir(parents=True, exist_ok=True)
    @classmethod
    def load(cls, folder):
        calls.append(('load', 0))
        return cls()

def columns(names):
    return [Column('all', names[0], names[0]),
        Column('swap', names[0], names[-1], lambda t: t['method'].isin(['real', 'swap']))]

A, B = Row('a', DetailDetector), Row('b', DetailDetector, dict(noise=3.))
TABLE = Table('toy', 'A toy', [A, B, Row('c', after='b', settings=dict(noise=9.))], columns,
    paper_results='| theirs |')

@pytest.fixture(scope='module')
def manifests(): return {'x': tiny_manifest((24, 8, 20))}

def silent(line): pass
def run(manifests, cache, table=TABLE, seeds=2, probes=False, **settings):
    return TableRun(table, manifests, seeds, 'tiny', cache, silent, probes=probes, **settings).run()

@pytest.fixture(scope='module')
def done(manifests, tmp_path_factory): return run(manifests, tmp_path_factory.mktemp('done'))

# -- training and cache --
def test_each_row_is_trained_once_and_read_from_the_cache(manifests, tmp_path):
    calls.clear()
    r = run(manifests, tmp_path)
    assert [c for c in calls if c[0]=='fit']==[('fit', 0.), ('fit', 3.)]*2 and calls.count(('refit', 9.))==2
    calls.clear()
    assert run(manifests, tmp_path).results()==r.results() and not calls
    run(manifests, tmp_path, epochs=3) # another setting for all rows
    assert len(calls)==6
    calls.clear()
    run(manifests, tmp_path, Table('toy', '', [Row('a', DetailDetector, dict(noise=.5))], columns))
    assert calls==[('fit', .5)]*2

def test_tables_in_worker_processes_share_trainings(manifests, tmp_path):
    log, half = [], Table('half', '', TABLE.rows[:1], columns)
    def make(t): return TableRun(t, manifests, 2, 'tiny', tmp_path/'a', log.append, probes=False)
    found = run_tables([make(TABLE), make(half)], 2)
    assert len(log)==4 and log[-1].startswith('4 of 4 trainings') # two rows, two seeds; row c starts from b
    calls.clear()
    assert [r.results() for r in run_tables([make(TABLE), make(half)], 2)]==[r.results() for r in found] and not calls
    assert found[0].results()==run(manifests, tmp_path/'b').results()
    assert found[1].results()==[r for r in found[0].results() if r['row']=='a']

def test_interrupted_table_resumes(manifests, tmp_path):
    TableRun(TABLE, manifests, 2, 'tiny', tmp_path, silent).cell(A, 'x', 'x', 0)
    calls.clear()
    run(manifests, tmp_path)
    assert calls.count(('fit', 0.))==1

def test_detector_that_was_not_saved_completely_is_trained_again(manifests, tmp_path):
    t = Table('t', '', [Row('a', SavedDetector)], lambda names: [Column('all', names[0], names[0])])
    run(manifests, tmp_path, t, seeds=1)
    for delete, expected in ((['cells/*', 'detectors/*/trained.json'], ('fit', 0.)), (['cells/*'], ('load', 0))):
        for pattern in delete:
            for p in tmp_path.glob(pattern): p.unlink()
        calls.clear()
        run(manifests, tmp_path, t, seeds=1)
        assert calls==[expected]

def test_recipe_and_faces_are_part_of_the_key(manifests, tmp_path, monkeypatch):
    from deepfid.models.deepfidelity.detector import DeepFidelity
    ablation, m = get_table('ablation'), manifests['x']
    def key(): return TableRun(ablation, manifests, 1, 'tiny', tmp_path).key(ablation.rows[1], ('x',), 0)
    before = key()
    monkeypatch.setitem(DeepFidelity.recipes['ours'], 'lr', 9.)
    assert key()!=before
    a, b = (m.where(method=['real', f]) for f in ('swap', 'mouth'))
    assert a.key()!=b.key()!=m.key() and a.key()==m.where(method=['real', 'swap']).key()

def test_copy_without_a_repository_reads_its_commit_from_the_environment(monkeypatch):
    monkeypatch.setenv('DEEPFID_COMMIT', '0123abc')
    assert describe_code()==dict(commit='0123abc', changed=False)
    monkeypatch.setenv('DEEPFID_COMMIT', 'main')
    assert describe_code()['commit']!='main'

def first_half(manifest): return manifest.where(split=['valid', 'test'])
def refit_again(detector, manifest, noise): return detector.refit(manifest, noise)
def test_functions_of_one_name_have_their_own_cells():
    def key(row): return cache_key(row, {'a': A, row.name: row}, ['x'], 0, 'tiny', {})
    other = type('DetailDetector', (DetailDetector,), dict(__module__='elsewhere'))
    foreign = type(refit_again)(refit_again.__code__, {'__name__': 'elsewhere'}, 'refit_again')
    assert key(Row('a', DetailDetector))!=key(Row('a', other))
    assert key(Row('b', after='a', refit=refit_again))!=key(Row('b', after='a', refit=foreign))
    assert key(Row('b', after='a', change=first_half))!=key(Row('b', after='a')) # a refit sees other faces

def test_weights_are_known_by_their_content(tmp_path):
    from deepfid.models.local_similarity.detector import LocalSimilarity
    path = tmp_path/'start.safetensors'
    row, keys = Row('a', LocalSimilarity, dict(weights=str(path))), set()
    for content in (b'1', b'2'):
        path.write_bytes(content)
        keys.add(cache_key(row, {'a': row}, ['x'], 0, 'tiny', {}))
    assert len(keys)==2

@pytest.mark.parametrize('row, what', [(Row('a', DetailDetector, measure=partial(refit_again, noise=1)), 'measure'), (Row('a', DetailDetector, change=lambda m: m), 'change')])
def test_functions_without_a_name_are_refused(manifests, tmp_path, row, what):
    with pytest.raises(DeepfidError, match=f'`{what}` must be a function at the top of a module'): run(manifests, tmp_path, Table('t', '', [row], columns))

def test_a_training_collapsed_if_its_output_is_constant_on_all_test_faces(done):
    cells = list(done.cells.items())
    (row, train, test, seed), cell = next((at, c) for at, c in cells if at[0]=='a')
    flat = dict(cell, fidelity=[.5]*len(cell['fidelity']))
    try:
        done.cells = {(row, train, 'p', 7): flat, (row, train, 'q', 7): flat}
        assert done.collapsed_seeds(A, train)=={7: 'constant output'}
        for order in (('p', 'q'), ('q', 'p')): # a set too hard for it is no collapse
            done.cells = dict(zip([(row, train, test, 7) for test in order], (flat, cell)))
            assert not done.collapsed_seeds(A, train)
    finally: done.cells = dict(cells)

def test_key_changes_with_the_code(monkeypatch, tmp_path):
    (tmp_path/'losses.py').write_text('alpha = .5')
    monkeypatch.setattr('deepfid.__file__', str(tmp_path/'__init__.py'))
    def key():
        source_hash.cache_clear()
        return cache_key(A, {'a': A}, ['x'], 0, 'tiny', {})
    try:
        before = key()
        (tmp_path/'losses.py').write_text('alpha = .6')
        assert before!=key()
    finally: source_hash.cache_clear()

def test_change_of_the_code_during_a_run_leaves_its_keys(manifests, tmp_path, monkeypatch):
    "Worker processes start later than the run, and must find its cells"
    r = TableRun(TABLE, manifests, 1, 'tiny', tmp_path, silent)
    before = r.key(A, ('x',), 0)
    monkeypatch.setattr('deepfid.experiments.runner.source_hash', lambda: 'of other code')
    assert r.key(A, ('x',), 0)==before!=TableRun(TABLE, manifests, 1, 'tiny', tmp_path, silent).key(A, ('x',), 0)

# -- refused before training --
@pytest.mark.parametrize('table, message', [
    (Table('t', '', [A, A], columns), 'same name'), (Table('t', '', [A, Row('b', after='z')], columns), 'no row'),
    (Table('t', '', [A], columns, baseline='z'), "no row 'z'"), (Table('t', '', [], columns), 'one row'),
    (Table('t', '', [A, Row('b', after='b')], columns), 'b after b'),
    (Table('t', '', [A, Row('b', after='c'), Row('c', after='b')], columns), 'b after c after b'),
    (Table('t', '', [A, Row('b')], columns), 'needs a detector'),
    (Table('t', '', [A, Row('b', DetailDetector, after='a')], columns), 'needs a detector'),
    (Table('t', '', [A, Row('b', partial(DetailDetector, noise=1))], columns), 'must be a class'),
    (Table('t', '', [A, Row('b', after='a', refit=lambda d, m: d)], columns), 'not a lambda'),
    (Table('t', '', [A, Row('b', after='a', refit=partial(refit_again, noise=1))], columns), 'a partial'),
    (Table('t', '', [A], lambda n: [Column('x', 'nowhere', n[0])]), "no manifest 'nowhere'"),
    (Table('t', '', [A], lambda n: [Column('x', n[0], n[0], metrics=('video_auc',))]), 'column `video`')])
def test_badly_declared_table_is_refused(manifests, tmp_path, table, message):
    with pytest.raises(DeepfidError, match=message): TableRun(table, manifests, 1, 'tiny', tmp_path)

def test_missing_things_are_noticed_before_training(manifests, tmp_path):
    def absent(): raise DeepfidError('not at hand')
    calls.clear()
    with pytest.raises(DeepfidError, match='not at hand'):
        TableRun(Table('t', '', [A, Row('b', DetailDetector, check=absent)], columns), manifests, 1, 'tiny', tmp_path)
    with pytest.raises(DeepfidError, match='one seed'): TableRun(TABLE, manifests, 0, 'tiny', tmp_path)
    assert not calls

# -- numbers --
def test_numbers_are_those_of_the_scores(manifests, done):
    t = manifests['x'].of('test').table
    label, found = t['label'].to_numpy(), {(f['row'], f['column'], f['metric']): f for f in done.results()}
    by_seed = [auc(done.cells['b', 'x', 'x', s]['fidelity'], label) for s in range(2)]
    b = found['b', 'all', 'auc']
    assert b['seeds']==pytest.approx(by_seed) and b['value']==pytest.approx(np.mean(by_seed))
    assert found['a', 'all', 'auc']['difference'] is None
    swap = np.isin(t['method'], ['real', 'swap'])
    assert found['a', 'swap', 'accuracy']['faces']==swap.sum()
    correct = (np.array(done.cells['a', 'x', 'x', 0]['fidelity'])>=5.)==label
    assert found['a', 'swap', 'accuracy']['seeds'][0]==pytest.approx(correct[swap].mean())

def test_columns_without_faces_or_with_one_class(manifests, tmp_path):
    t = Table('t', '', [A], lambda n: [Column('none', n[0], n[0], lambda t: t['method']=='beauty'),
        Column('one class', n[0], n[0], lambda t: t['label']==1)])
    found = run(manifests, tmp_path, t, seeds=1).results(n_boot=20)
    assert [f['value'] is None for f in found]==[True, True, False, True] and '–' in markdown_table(found)
    assert average_over_seeds([(np.array([1., 2., 3.]), 2.)], np.ones(3), 'accuracy').value==pytest.approx(2/3)
    with pytest.raises(MetricError, match='both'): average_over_seeds([(np.array([1., 2., 3.]), 2.)], np.ones(3))

def test_columns_without_masks_have_no_mask_scores(manifests, tmp_path):
    t = Table('t', '', [A], lambda n: [Column('all', n[0], n[0], metrics=('auc', 'iou'))])
    r = run(manifests, tmp_path, t, seeds=1)
    assert [f['value'] is None for f in r.results(20)]==[False, True] and r.results(20)[1]['faces']==0
    assert r.mean_mask_baselines()=={}

def test_masks_for_some_faces_only_are_refused(manifests):
    class FakeMaskDetector(DetailDetector):
        def predict(self, faces, batch_size=32):
            return [Prediction(p.fidelity, np.ones((8, 8)) if i%2 else None)
                for i, p in enumerate(super().predict(faces))]
    with pytest.raises(DeepfidError, match='a mask for'): score_test_faces(FakeMaskDetector(), manifests['x'])

def test_significance_needs_people_and_seeds():
    difference = dict(value=.05, low=.02, high=.08)
    assert significance(difference|dict(seeds=[.05, .052, .048]))=='significantly better'
    assert significance(dict(value=-.05, low=-.08, high=-.02, seeds=[-.05, -.052, -.048]))=='significantly worse'
    for uncertain in (difference|dict(seeds=[.2, -.1, .05]), difference|dict(seeds=[.05]),
        dict(value=.01, low=-.02, high=.04, seeds=[.01, .011, .009])): assert significance(uncertain)=='not significant'

def test_mean_mask_baseline(manifests):
    m = manifests['x']
    train, test = (m.where(split=s, label=0) for s in ('train', 'test'))
    mean = np.mean([train.mask(i) for i in range(len(train))], 0)
    by_hand = [score_face_mask(mean, test.mask(i)) for i in range(len(test))]
    found = mean_mask_baseline(mean_training_mask(m), m)
    assert found['iou']==pytest.approx(np.mean([s['iou'] for s in by_hand]))
    bare = Manifest(m.table.assign(mask=''), m.folder)
    assert mean_training_mask(bare) is None and mean_mask_baseline(mean_training_mask(m), bare) is None

def test_lower_error_rates_are_better():
    lower = dict(value=-.05, low=-.08, high=-.02, seeds=[-.05, -.052, -.048])
    higher = dict(value=.05, low=.02, high=.08, seeds=[.05, .052, .048])
    assert significance(lower, 'eer')=='significantly better' and significance(higher, 'eer')=='significantly worse'
    result = dict(row='b', column='all', metric='eer', value=.1, low=.08, high=.12, seeds=[.1]*3, difference=lower)
    assert '| significantly better |' in comparison_table([result])
    assert RecordReader(dict(results=[result])).significance('b', 'all', 'eer')=='significantly better'

# -- records --
def test_record_can_be_repeated_and_shown(done):
    record = json.loads(json.dumps(done.record()))
    assert {'config', 'data', 'seed', 'commit', 'hardware', 'versions', 'seconds', 'metrics'}<=set(record)
    assert all({'value', 'low', 'high'}==set(v) for v in record['metrics'].values())
    text = record_markdown(record, TABLE)
    assert all(part in text for part in ('other data', '| theirs |', '±', '| c |', 'Positive class: fake'))
    assert markdown_table(record['results']).count('\n')==4 and 'by seed' in comparison_table(record['results'])
    assert record['baseline']=='a' and record['trained_at'] and record['seconds']>0 and upgrade_record(record)==record

def test_names_of_older_records_are_renamed_and_numbers_kept(repo):
    for path in sorted([*(repo/'nbs/results').glob('table-*.json'), *(repo/'tests/golden/records').glob('table-*.json')]):
        old, new = json.loads(path.read_text()), read_record(path)
        assert [r['value'] for r in old['results']]==[r['value'] for r in new['results']]
        assert {r['row'] for r in new['results']}=={r['name'] for r in new['config']['rows']}
        assert upgrade_record(new)==new
        for r in RecordReader(new).significant(): assert r['difference']['low']*r['difference']['high']>0

# -- the tables of the papers, and the command --
def test_every_registered_table_can_be_set_up(manifests, tmp_path, monkeypatch):
    x = manifests['x']
    x = Manifest(x.table.assign(video=x.table['pair']), x.folder, 'x')
    for name in list_tables():
        t = get_table(name)
        if t.derive_manifests: # only names are needed here, not the images
            derived = {f'{m}, {v}': x for m in 'xy' for v in ('c0', 'c23', 'c40', 'degraded', 'seen')}
            t = Table(**vars(t)|dict(derive_manifests=lambda manifests, folder, derived=derived: derived))
        try: r = TableRun(t, {'x': x, 'y': x}, 1, 'tiny', tmp_path)
        except DataMissingError as e: # BRISQUE's model, where it is neither at hand nor to be fetched
            assert name=='quality' and 'brisque' in str(e)
            continue
        assert r.columns and len({r.key(row, ('x', 'x'), 0) for row in t.rows})==len(t.rows), name

@pytest.mark.parametrize('options', [dict(preset='full'), dict(preset='full', train_steps=100), dict(recipe='finetune', backbone='efficientnet_lite0'),
    dict(recipe='finetune', backbone='efficientnet_lite0', preset='full')])
def test_tables_of_masks_are_set_up_as_their_notebooks_say(manifests, tmp_path, options):
    "Equal steps, schedules, batches and starts; the classifier of each row where its name says"
    x = Manifest(manifests['x'].table.assign(video=manifests['x'].table['pair']), manifests['x'].folder, 'x')
    derived = {f'{m}, {v}': x for m in 'xy' for v in ('c0', 'c23', 'c40')}
    for name in (n for n in list_tables() if n.startswith(('lisiam-', 'similarity-'))):
        t = Table(**vars(get_table(name))|dict(derive_manifests=lambda manifests, folder: derived))
        r = TableRun(t, {'x': x, 'y': x}, 1, cache=tmp_path, **dict(preset='tiny')|options)
        steps = {row.name: r.training_length(row, 'x')['steps'] for row in r.table.rows if row.detector and not row.frozen}
        wanted = options.get('train_steps', 2000)
        assert all(abs(n-wanted)<=.02*wanted for n in steps.values()), (name, steps)
        for row in r.table.rows:
            if row.detector and 'cls_from' in row.settings: assert r.rows[row.name].settings['cls_from']==('encoder' if 'encoder head' in row.name else 'decoder')

def test_rows_that_depend_on_the_networks_size(manifests, tmp_path):
    two = {'x': manifests['x'], 'y': manifests['x']}
    def rows(preset, **kw): return list(TableRun(get_table('blocks'), two, 1, preset, tmp_path, probes=False, **kw).rows)
    assert rows('tiny')==[f'{n} blocks' for n in range(5)] and rows('full')==[f'{n} blocks' for n in range(16)]
    assert rows('full', arch='ssaaformer_small')[-1]=='7 blocks'

def test_figures_say_how_many_detectors_they_take(manifests):
    assert {n: get_figure(n).max_detectors for n in list_figures()}==dict(blocks=1, masks=0, degradations=0,
        similarity=1, segmentation=1, attention=2, features=1, **{'attention-levels': 2})
    assert get_figure('masks')(manifests['x']).dtype==np.uint8

def test_command(manifests, tmp_path, capsys):
    manifests['x'].save()
    csv = str(manifests['x'].folder/'manifest.csv')
    status = cli.main(['table', 'ablation', '--manifest', csv, '--seeds', '1', '--epochs', '1', '--preset', 'tiny',
        '--out', str(tmp_path)])
    out = capsys.readouterr().out
    assert status==0 and 'SSAA and mapping' in out and 'other data' in out
    record = json.loads((tmp_path/'table-ablation.json').read_text())
    assert record['seed']==[0] and len(record['results'])==22 and record['verdicts'] # eleven rows, two metrics
    assert list(tmp_path.glob('detectors/*/network.safetensors'))

@pytest.mark.parametrize('argv, message', [(['cross', '--manifest', 'synthetic'], 'needs 2 manifests'),
    (['intra', '--manifest', 'none.csv'], 'none.csv')])
def test_command_refuses_in_one_line(argv, message, capsys, tmp_path):
    assert cli.main(['table', *argv, '--out', str(tmp_path/'o')])==1
    err = capsys.readouterr().err
    assert message in err and err.count('\n')==1 and not (tmp_path/'o').exists()

@pytest.mark.parametrize('options', [['--epochs', '0'], ['--seeds', '-1']])
def test_command_wrong_usage(options, capsys):
    with pytest.raises(SystemExit) as e: cli.main(['table', 'intra', '--manifest', 'synthetic', *options])
    assert e.value.code==2 and 'error:' in capsys.readouterr().err

def test_a_control_that_lacks_quality_is_refused_before_any_training(manifests, tmp_path):
    bare = Manifest(manifests['x'].table.assign(quality=np.nan), manifests['x'].folder)
    with pytest.raises(DeepfidError, match='no quality to shuffle'): TableRun(get_table('ablation'), {'x': bare}, 1, 'tiny', tmp_path, lambda line: None)
    assert not (tmp_path/'cells').exists()
