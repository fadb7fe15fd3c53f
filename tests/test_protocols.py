"Tables as data: what is run, what is kept, what is printed"
import json
import numpy as np, pytest
from deepfid import cli
from deepfid.core import DataMissingError, DeepfidError, Detector, Prediction
from deepfid.evaluate.metrics import MetricError, auc, auc_difference, auc_interval, over_seeds
from deepfid.experiments.runner import Column, Row, Table, TableRun, describe_code, describe_run, gains, markdown_table, run_tables, show_record, verdict
from deepfid.testing import tiny_manifest

calls = []
class Sharp(Detector):
    "How much detail there is, and some noise"
    name = 'sharp'
    def __init__(self, seed=0, noise=0., epochs=None): self.rng, self.noise, self.threshold = np.random.default_rng(seed), noise, 5.
    def fit(self, manifest, preset=None, recipe='ours', cbs=None):
        calls.append(('fit', self.noise))
        return self
    def predict(self, faces, batch_size=32): return [Prediction(np.abs(np.diff(f.astype(float), axis=1)).mean()+self.noise*self.rng.normal()) for f in faces]
    def refit(self, manifest, noise):
        calls.append(('refit', noise))
        other = Sharp(1, noise)
        return other

TABLE = Table('toy', 'A toy', [Row('a', Sharp), Row('b', Sharp, dict(noise=3.)), Row('c', after='b', settings=dict(noise=9.))],
    lambda names: [Column('all', names[0], names[0]), Column('swap', names[0], names[-1], lambda t: t['method'].isin(['real', 'swap']))], paper='| theirs |')

@pytest.fixture(scope='module')
def manifests(): return {'x': tiny_manifest((24, 8, 20))}

def run(manifests, cache, table=TABLE, **kw): return TableRun(table, manifests, kw.pop('seeds', 2), 'tiny', cache, lambda s: None, **kw).run()

def test_what_is_trained_is_trained_once(manifests, tmp_path):
    calls.clear()
    r = run(manifests, tmp_path)
    assert [c for c in calls if c[0]=='fit']==[('fit', 0.), ('fit', 3.)]*2 and len([c for c in calls if c[0]=='refit'])==2
    calls.clear()
    assert run(manifests, tmp_path).results()==r.results() and not calls

def test_another_setting_is_another_cell(manifests, tmp_path):
    run(manifests, tmp_path)
    calls.clear()
    run(manifests, tmp_path, epochs=3)
    assert calls
    changed = Table('toy', '', [Row('a', Sharp, dict(noise=.5))], TABLE.columns)
    calls.clear()
    run(manifests, tmp_path, changed)
    assert calls==[('fit', .5)]*2

def test_several_tables_in_several_processes_train_what_they_share_once(manifests, tmp_path):
    said, half = [], Table('half', '', TABLE.rows[:1], TABLE.columns)
    make = lambda t: TableRun(t, manifests, 2, 'tiny', tmp_path/'a', said.append)
    found = run_tables([make(TABLE), make(half)], 2)
    assert len(said)==4 and said[-1].startswith('4 of 4 trainings') # two rows of two seeds; the third row starts from the second
    calls.clear()
    assert [r.results() for r in run_tables([make(TABLE), make(half)], 2)]==[r.results() for r in found] and not calls
    assert found[0].results()==run(manifests, tmp_path/'b').results() and found[1].results()==[r for r in found[0].results() if r['row']=='a']

class Broken(Sharp):
    def fit(self, *args, **kw): raise DeepfidError('out of order')

def test_a_failure_in_another_process_ends_the_table(manifests, tmp_path):
    with pytest.raises(DeepfidError, match='out of order'):
        run_tables([TableRun(Table('bad', '', [Row('x', Broken)], TABLE.columns), manifests, 2, 'tiny', tmp_path)], 2)

def test_a_copy_without_a_repository_may_be_told_its_commit(monkeypatch):
    monkeypatch.setenv('DEEPFID_COMMIT', '0123abc')
    assert describe_code()==dict(commit='0123abc', changed=False)
    monkeypatch.setenv('DEEPFID_COMMIT', 'main')
    assert describe_code()['commit']!='main'

def test_interrupted_table_goes_on(manifests, tmp_path):
    class Cut(Exception): pass
    r = TableRun(TABLE, manifests, 2, 'tiny', tmp_path, lambda s: None)
    def stop(*a): raise Cut
    r.cell(TABLE.rows[0], 'x', 'x', 0)
    calls.clear()
    run(manifests, tmp_path)
    assert calls.count(('fit', 0.))==1

def test_numbers_are_those_of_the_scores(manifests, tmp_path):
    r = run(manifests, tmp_path)
    label = manifests['x'].of('test').table['label'].to_numpy()
    found = {(f['row'], f['column'], f['metric']): f for f in r.results()}
    want = [auc(r.cells['b', 'x', 'x', s]['fidelity'], label) for s in range(2)]
    assert found['b', 'all', 'auc']['seeds']==pytest.approx(want) and found['b', 'all', 'auc']['value']==pytest.approx(np.mean(want))
    assert found['a', 'all', 'auc']['gain'] is None
    swap = np.isin(manifests['x'].of('test').table['method'], ['real', 'swap'])
    assert found['a', 'swap', 'accuracy']['faces']==swap.sum()
    correct = (np.array(r.cells['a', 'x', 'x', 0]['fidelity'])>=5.)==label
    assert found['a', 'swap', 'accuracy']['seeds'][0]==pytest.approx(correct[swap].mean())

def test_record_can_be_repeated_and_shown(manifests, tmp_path):
    record = run(manifests, tmp_path).record()
    assert {'config', 'data', 'seed', 'commit', 'hardware', 'versions', 'seconds', 'metrics'}<=set(record)
    assert all({'value', 'low', 'high'}==set(v) for v in record['metrics'].values())
    text = show_record(json.loads(json.dumps(record)), TABLE)
    assert 'other data' in text and '| theirs |' in text and '±' in text and '| c |' in text
    assert markdown_table(record['results']).count('\n')==4 and 'seed by seed' in gains(record['results']) and record['baseline']=='a'
    assert record['trained_at'] and record['seconds']>0

def test_one_class_has_an_accuracy_and_no_auc(manifests):
    runs = [(np.array([1., 2., 3.]), 2.)]
    assert over_seeds(runs, np.ones(3), 'accuracy').value==pytest.approx(2/3)
    with pytest.raises(MetricError, match='both'): over_seeds(runs, np.ones(3))
    with pytest.raises(MetricError, match='unknown'): over_seeds([(np.array([1., 2.]), 1.)], np.array([0, 1]), 'beauty')

def test_over_seeds_is_the_usual_interval_for_one_seed():
    rng = np.random.default_rng(0)
    label, a, b = np.repeat([0, 1], 60), rng.normal(size=120), rng.normal(size=120)
    a[60:] += 1
    assert over_seeds([(a, 0)], label, n_boot=200)==pytest.approx(auc_interval(a, label, n_boot=200))
    assert over_seeds([(b, 0)], label, minus=[(a, 0)], n_boot=200)==pytest.approx(auc_difference(a, b, label, n_boot=200))

@pytest.mark.parametrize('table, says', [
    (Table('t', '', [Row('a', Sharp), Row('a', Sharp)], TABLE.columns), 'same name'), (Table('t', '', [Row('a', Sharp), Row('b', after='c')], TABLE.columns), 'no row'),
    (Table('t', '', [Row('a', Sharp)], TABLE.columns, baseline='z'), "no row 'z'"), (Table('t', '', [Row('a', Sharp)], lambda n: [Column('x', 'nowhere', n[0])]), "no manifest 'nowhere'")])
def test_badly_declared_table_is_refused_before_training(manifests, tmp_path, table, says):
    with pytest.raises(DeepfidError, match=says): TableRun(table, manifests, 1, 'tiny', tmp_path)

def test_missing_things_are_noticed_before_training(manifests, tmp_path):
    def absent(): raise DeepfidError('not at hand')
    calls.clear()
    with pytest.raises(DeepfidError, match='not at hand'): TableRun(Table('t', '', [Row('a', Sharp), Row('b', Sharp, check=absent)], TABLE.columns), manifests, 1, 'tiny', tmp_path)
    with pytest.raises(DeepfidError, match='one seed'): TableRun(TABLE, manifests, 0, 'tiny', tmp_path)
    assert not calls

def test_other_rows_of_a_manifest_are_other_faces(manifests, tmp_path):
    m = manifests['x']
    a, b = (m.where(method=['real', f]) for f in ('swap', 'mouth'))
    assert a.key()!=b.key()!=m.key() and a.key()==m.where(method=['real', 'swap']).key()

def test_recipe_and_preset_are_part_of_the_key(manifests, tmp_path, monkeypatch):
    from deepfid.models.deepfidelity import detector as learner
    from deepfid.experiments.deepfidelity import ablation
    key = lambda: TableRun(ablation, manifests, 1, 'tiny', tmp_path).key(ablation.rows[1], ('x',), 0)
    before = key()
    monkeypatch.setitem(learner.RECIPES['ours'], 'lr', 9.)
    assert key()!=before

def test_columns_without_faces_have_no_number(manifests, tmp_path):
    t = Table('t', '', [Row('a', Sharp)], lambda n: [Column('none', n[0], n[0], lambda t: t['method']=='beauty'), Column('one class', n[0], n[0], lambda t: t['label']==1)])
    found = run(manifests, tmp_path, t, seeds=1).results(n_boot=20)
    assert [f['value'] is None for f in found]==[True, True, False, True] and '–' in markdown_table(found)

def test_verdict_needs_people_and_seeds():
    gain = dict(value=.05, low=.02, high=.08)
    assert verdict(gain|dict(seeds=[.05, .052, .048]))=='better' and verdict(gain|dict(seeds=[.2, -.1, .05]))=='not told apart'
    assert verdict(dict(value=.01, low=-.02, high=.04, seeds=[.01, .011, .009]))=='not told apart' and verdict(gain|dict(seeds=[.05]))=='not told apart'
    assert verdict(dict(value=-.05, low=-.08, high=-.02, seeds=[-.05, -.052, -.048]))=='worse'

def test_table_that_needs_more_manifests(manifests, tmp_path):
    with pytest.raises(DeepfidError, match='needs 2 manifests'): TableRun(Table('t', '', TABLE.rows, TABLE.columns, needs=2), manifests)

# -- the paper's tables --
def test_every_table_of_the_paper_can_be_set_up(manifests, tmp_path):
    from deepfid.experiments.deepfidelity import TABLES
    assert {'intra', 'cross', 'ablation', 'quality', 'ranges', 'blocks'}<=set(TABLES)
    for t in TABLES.values():
        try: r = TableRun(t, {'x': manifests['x'], 'y': manifests['x']}, 1, 'tiny', tmp_path)
        except DataMissingError as e: # BRISQUE's model, where it is neither at hand nor to be fetched
            assert t.name=='quality' and 'brisque' in str(e)
            continue
        assert r.columns and all(row.after in r.rows for row in t.rows if row.after)
        assert len({r.key(row, ('x', 'x'), 0) for row in t.rows})==len(t.rows), t.name

def test_ranges_of_quality_hold_every_face_once(manifests):
    from deepfid.experiments.deepfidelity import by_quality, in_range
    t = manifests['x'].of('test').table.reset_index(drop=True)
    columns = by_quality(['x'])
    for part in (columns[:8], columns[8:]): assert (sum(c.only(t).astype(int) for c in part)==1).all()
    with pytest.raises(DeepfidError, match='no quality'): in_range(t.assign(quality=np.nan), 1, 0, 'width')

def test_command(manifests, tmp_path, capsys):
    manifests['x'].save()
    status = cli.main(['table', 'ablation', '--manifest', str(manifests['x'].folder/'manifest.csv'), '--seeds', '1', '--epochs', '1', '--preset', 'tiny', '--out', str(tmp_path)])
    out = capsys.readouterr().out
    assert status==0 and 'SSAA and mapping' in out and 'other data' in out
    record = json.loads((tmp_path/'table-ablation.json').read_text())
    assert record['seed']==[0] and len(record['results'])==8
    assert list(tmp_path.glob('detectors/*/network.safetensors'))

@pytest.mark.parametrize('argv, says', [(['table', 'beauty', '--manifest', 'synthetic'], 'no table'), (['table', 'cross', '--manifest', 'synthetic'], 'needs 2 manifests'), (['table', 'intra', '--manifest', 'none.csv'], 'none.csv')])
def test_command_refuses_in_one_line(argv, says, capsys, tmp_path):
    assert cli.main([*argv, '--out', str(tmp_path/'o')])==1
    err = capsys.readouterr().err
    assert says in err and err.count('\n')==1 and not (tmp_path/'o').exists()

@pytest.mark.parametrize('argv', [['table', 'intra', '--manifest', 'synthetic', '--epochs', '0'], ['table', 'intra', '--manifest', 'synthetic', '--seeds', '-1'], ['table', 'intra']])
def test_command_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as e: cli.main(argv)
    assert e.value.code==2 and 'error:' in capsys.readouterr().err

def test_detector_whose_saving_was_cut_off_is_trained_again(manifests, tmp_path):
    class Kept(Sharp):
        def save(self, folder): folder.mkdir(parents=True, exist_ok=True)
        @classmethod
        def load(cls, folder):
            calls.append(('load', 0))
            return cls()
    t = Table('t', '', [Row('a', Kept)], lambda n: [Column('all', n[0], n[0])])
    run(manifests, tmp_path, t, seeds=1)
    for p in [*tmp_path.glob('cells/*'), *tmp_path.glob('detectors/*/trained.json')]: p.unlink()
    calls.clear()
    run(manifests, tmp_path, t, seeds=1)
    assert calls==[('fit', 0.)]
    for p in tmp_path.glob('cells/*'): p.unlink()
    calls.clear()
    run(manifests, tmp_path, t, seeds=1)
    assert calls==[('load', 0)]

def test_a_mask_that_looks_at_nothing_is_the_mark_to_beat():
    from deepfid.data.manifest import Manifest
    from deepfid.experiments.runner import blind_mask, score_mask
    m = tiny_manifest()
    fakes = {s: m.where(split=s, label=0) for s in ('train', 'test')}
    always = np.mean([fakes['train'].mask(i) for i in range(len(fakes['train']))], 0)
    by_hand = [score_mask(always, fakes['test'].mask(i)) for i in range(len(fakes['test']))]
    blind = blind_mask(m, m)
    assert blind['iou']==pytest.approx(np.mean([s['iou'] for s in by_hand])) and .8<blind['pixel_auc']<=1
    assert blind_mask(m, Manifest(m.table.assign(mask=''), m.folder)) is None

def test_rows_that_depend_on_the_networks_size(manifests, tmp_path):
    from deepfid.experiments.deepfidelity import TABLES
    def rows(preset, **kw): return list(TableRun(TABLES['blocks'], {'x': manifests['x'], 'y': manifests['x']}, 1, preset, tmp_path, **kw).rows)
    assert rows('tiny')==[f'{n} blocks' for n in range(5)] and rows('full')==[f'{n} blocks' for n in range(16)]
    assert rows('full', arch='ssaaformer_small')[-1]=='7 blocks'
