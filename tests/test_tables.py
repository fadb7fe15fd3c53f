"The tables of the papers at toy size: premises, controls, derived faces and what their records say"
import json
from pathlib import Path
import cv2, numpy as np, pandas as pd
import pytest
from deepfid.core import DeepfidError
from deepfid.data.manifest import Manifest
from deepfid.experiments import conditions
from deepfid.experiments.controls import premise_lines, quality_premise
from deepfid.experiments.designed import CONDITION_TABLES
from deepfid.experiments.markdown import record_markdown
from deepfid.experiments.records import holm, p_value, read_record
from deepfid.experiments.registry import get_table, list_tables
from deepfid.experiments.runner import Table, TableRun, within_columns

RESULTS = Path(__file__).resolve().parents[1]/'nbs'/'results'

@pytest.fixture(scope='module')
def faces(tmp_path_factory):
    from deepfid.experiments.demo import demo_pairs
    return demo_pairs('synthetic', tmp_path_factory.mktemp('faces')/'m', 20, size=64, workers=1)

def toy(name, faces, folder, more=(), **settings):
    "Run a table on a handful of faces, a step an epoch"
    said, manifests = [], {'x': faces, **{k: faces for k in more}}
    settings = dict(train_steps=1, size=64, bs=8, seeds=1)|settings
    table = get_table(name) if isinstance(name, str) else name
    run = TableRun(table, manifests, settings.pop('seeds'), 'tiny', folder, said.append, **settings)
    return run.run(), said

# -- premises --
def rising(n=600, seed=0, of_fakes=1):
    "Quality, scores that rise with it (of fakes: or fall, with -1), and labels"
    rng = np.random.default_rng(seed)
    label, quality = np.tile([0, 1], n//2), rng.random(n)
    return quality, (.3*label+np.where(label==1, 1, of_fakes)*.5*quality+rng.normal(0, .3, n), .5), label

def test_premise_holds_only_where_scores_rise_with_quality_in_both_classes():
    from scipy.stats import spearmanr
    quality, scores, label = rising()
    found = quality_premise(quality, [scores], label, n_boot=200)
    by_class = [spearmanr(quality[label==k], scores[0][label==k])[0] for k in (0, 1)]
    assert [found[k]['value'] for k in ('of_fakes', 'of_reals')]==pytest.approx(by_class) and found['holds']
    assert found['correlation']['value']==pytest.approx(np.mean(by_class))
    assert all(found[k]['low']<found[k]['value']<found[k]['high'] for k in ('of_fakes', 'of_reals', 'correlation'))
    assert [q['faces'] for q in found['quartiles']]==[150]*4
    # a network that is surer of better fakes says the contrary of the mapping's targets, and tells better faces apart better
    quality, scores, label = rising(of_fakes=-1)
    surer = quality_premise(quality, [scores], label, n_boot=200)
    assert not surer['holds'] and surer['of_fakes']['high']<0<surer['of_reals']['low']
    assert surer['quartiles'][3]['value']>surer['quartiles'][0]['value']+.05
    other = quality_premise(np.random.default_rng(1).permutation(quality), [scores], label, n_boot=200)
    assert not other['holds'] and abs(other['correlation']['value'])<.1
    # faces of one class that are better, and for that reason only further from the threshold, are no evidence
    shifted = quality_premise(quality*0+label+.1*np.random.default_rng(2).random(600), [(1.*label-.2, .5)], label, n_boot=200)
    assert not shifted['holds']
    with pytest.raises(DeepfidError, match='no quality'): quality_premise(quality*np.nan, [scores], label)

def test_premise_is_told_before_the_rows_and_recorded(faces, tmp_path):
    from deepfid.experiments.deepfidelity import MAPPING_ROW, PLAIN_ROW, quality_premises
    table = Table('t', 't', [PLAIN_ROW, MAPPING_ROW], within_columns, premise=quality_premises)
    run, said = toy(table, faces, tmp_path, epochs=1, probes=False)
    record = run.record()
    assert [p['faces'] for p in record['premise']]==['x', 'x, degraded'] and {p['trained'] for p in record['premise']}=={'x'}
    lines = premise_lines(record['premise'])
    assert [l for l in said if l.startswith('premise')]==lines
    first = next(i for i, l in enumerate(said) if l.startswith('t:'))
    assert said.index(lines[0])<first # only the plain network was trained by then
    text = record_markdown(record, run.table)
    assert text.index('**Premise**')<text.index('| plain network |')

def test_tables_about_quality_have_a_premise_and_controls():
    ablation, quality, ranges = map(get_table, ('ablation', 'quality', 'ranges'))
    assert ablation.premise and quality.premise and ranges.premise
    assert ablation.controls['mapping']=='mapping, shuffled quality' and ablation.controls['SSAA']=='flipped top to bottom'
    assert all(quality.controls[k]=='shuffled quality' for k in ('NIQE', 'BRISQUE', 'SER-FIQ', 'predicted difficulty'))
    for t in (ablation, quality, ranges):
        assert {'label SVR', 'shuffled quality', 'target: fidelity', 'target: fidelity, shuffled quality'}<={r.name for r in t.rows}
    names = ['x', 'x, degraded'] # both are asked of faces whose quality varies
    assert {c.train for t in (quality, ranges) for c in t.columns(names)}=={'x, degraded'}

def test_clips_of_several_methods_and_one_name_stay_apart(tmp_path):
    "A forgery of a clip has its name, in published sets, by each method"
    frames, rows = {}, []
    for k, method in enumerate(('real', 'swap', 'mouth')):
        for i in range(3):
            path = f'{method}-{i}.png'
            frames[path] = np.full((32, 32, 3), 60*(k+1), np.uint8)
            cv2.imwrite(str(tmp_path/path), frames[path])
            rows.append(dict(path=path, label=int(method=='real'), identity='a', split='test', method=method, video='000', frame=i))
    m = Manifest(pd.DataFrame(rows), tmp_path, 'm')
    made = conditions.compressed_manifests({'m': m}, tmp_path/'out', ('c40',))['m, c40']
    for i in range(len(m)): assert np.abs(made.image(i).astype(int)-m.image(i)).mean()<8, m.table['path'][i]

def test_altered_faces_of_people_who_did_not_agree_are_not_drawn(faces):
    from deepfid.experiments.figures import example_faces
    for method in ('selfblend', 'sbi', 'reconstruct', 'region_eye'):
        t = faces.table.assign(consent=False)
        t.loc[t['label']==0, 'method'] = method
        with pytest.raises(DeepfidError, match='did not agree'): example_faces(Manifest(t, faces.folder, 'x'))

def test_every_table_says_what_it_expects():
    missing = [n for n in list_tables() if not (t := get_table(n)).prediction or not t.train_steps]
    assert not missing

def test_degraded_pairs_are_degraded_alike_and_widely(faces, tmp_path):
    made = conditions.degraded_manifests({'x': faces}, tmp_path)['x, degraded']
    before, after = (m.table['quality'] for m in (faces, made))
    assert after.notna().all() and (after!=before).all() and made.table['pair'].equals(faces.table['pair'])
    for i in range(4): # a pair's strength follows from its name
        name = f"{faces.table['dataset'].iloc[i]}/{faces.table['pair'].iloc[i]}"
        assert (conditions.degrade_pair(faces.image(i), name)==made.image(i)).all()
    image = faces.image(0)
    assert (conditions.degrade_pair(image, 'p')==conditions.degrade_pair(image, 'p')).all()
    assert (conditions.degrade_pair(image, 'p')!=conditions.degrade_pair(image, 'q')).any()

# -- smoke tests of rows and columns --
@pytest.fixture(scope='module')
def lisiam(faces):
    from deepfid.models.lisiam.detector import LiSiam
    return LiSiam(size=64, epochs=3, steps=1, bs=8, pretrained=False).fit(faces, 'tiny')

def test_attention_is_measured_and_maps_of_others_guide(lisiam, faces):
    import torch
    from deepfid.experiments.lisiam import effective_keys, refit_maps_of_others
    measured = effective_keys(lisiam, faces)
    assert 1<=measured['effective keys']<=measured['keys']+1e-3
    uniform = effective_keys(lisiam, faces)['keys']
    lisiam.model.mt.query.weight.data, kept = 0*lisiam.model.mt.query.weight.data, lisiam.model.mt.query.weight.data
    assert effective_keys(lisiam, faces)['effective keys']==pytest.approx(uniform, rel=1e-4) # no query: every key alike
    lisiam.model.mt.query.weight.data = kept
    other = refit_maps_of_others(lisiam, faces)
    x = torch.cat([*lisiam.batches([faces.image(i) for i in range(4)])])
    with torch.inference_mode():
        net = lisiam.model.eval()
        features, seg, _ = net.locate(x)
        assert torch.allclose(other.model.eval()(x).logits, net.classify(features, seg[[3, 0, 1, 2]])[0], atol=1e-5)
    assert other.model is not lisiam.model and len(other.predict([faces.image(0)]))==1

def test_mask_sources_at_two_levels(faces, tmp_path):
    few = faces.where(pair=faces.table['pair'].unique()[:4].tolist())
    made = conditions.mask_source_manifests({'x': few}, tmp_path)
    assert set(made)=={'x, c23', 'x, c40'} and len(get_table('lisiam-masks').columns(['x', *made]))==2
    exact = made['x, c40']
    for change in (conditions.ssim_masks, conditions.diff_masks):
        m = change(exact)
        m.check()
        trained = (m.table['split']!='test')&(m.table['label']==0)
        assert (m.table['mask']!=exact.table['mask'])[trained].all() and (m.table['mask']==exact.table['mask'])[~trained].all()
        i = int(np.flatnonzero(trained)[0])
        assert set(np.unique(m.mask(i)))<={0., 1.}

def test_forgers_are_tested_on_foreign_sets_too(faces):
    parts = conditions.forger_manifests({'x': faces, 'y': faces, 'z': faces})
    assert {n.split(', ')[0] for n in parts}=={'x'}
    columns = conditions.forger_columns(['x', 'y', 'z', *parts])
    n = len(parts)
    assert len(columns)==n*n+2*n and {c.test for c in columns}=={*parts, 'y', 'z'} and {c.train for c in columns}=={*parts}
    results = [dict(row='r', column=c.name, metric='auc', value=.9 if c.test==c.train else .6 if ', ' in c.test else .2) for c in columns]
    assert 'not trained on: 60.0' in conditions.transfer_matrix(dict(results=results)) # foreign sets are no forgers

def test_attention_at_each_level(lisiam, faces):
    from deepfid.experiments.figures import attention_drift, attention_figure, attention_levels_figure
    one, levels = attention_figure(faces, lisiam, lisiam), attention_levels_figure(faces, lisiam, lisiam)
    assert levels.shape[0]>2.5*one.shape[0] and levels.dtype==np.uint8 # a page a level and detector
    drift = attention_drift(faces, lisiam)
    assert list(drift)==['c0', 'c23', 'c40'] and drift['c0']['correlation'] in (0, pytest.approx(1))
    from deepfid.experiments.registry import get_figure
    assert get_figure('attention-levels').max_detectors==2

def test_heads_by_place():
    rows = {r.name: r for r in get_table('similarity-ablation').rows}
    places = {n: r.create().resolve_config('tiny') for n, r in rows.items()}
    assert {(c.use_llsm, c.use_flm and c.beta>0, c.use_flm and c.cls_from=='decoder') for c in places.values()}=={
        (a, b, d) for a in (False, True) for b in (False, True) for d in (False, True)} # {plain, map, decoder, both} x two heads

def test_training_that_learned_nothing_is_told(faces, tmp_path):
    from deepfid.commands import training_summary
    class Fixed:
        name, threshold = 'fixed', .5
        def __init__(self, spread): self.spread = spread
        def score(self, manifest): return .5+self.spread*(manifest.table['label'].to_numpy()-.5)
    assert 'nothing was learned (constant output)' in training_summary(Fixed(0.), faces, tmp_path)['text']
    assert 'nothing was learned' not in training_summary(Fixed(.5), faces, tmp_path)['text']

# -- sentences about recorded tables ------------------------------------------------------------------------------------

def recorded(table, row, column, metric='auc'):
    record = read_record(RESULTS/f'table-condition-{table}.json')
    found, = [r for r in record['results'] if (r['row'], r['column'], r['metric'])==(row, f'london, {column}', metric)]
    return found|dict(points={k: 100*(found['difference'] or {}).get(k, 0) for k in ('value', 'low', 'high')}, visible=100*record['smallest_difference'][found['column']])

def typed_sentences():
    "What lessons say in words beside the cells that draw a record: (notebook, words)"
    decoder = recorded('regions', 'decoder', 'small regions', 'iou_gain')
    gained = f"{100*decoder['value']:.1f} points"
    assert sum(100*s>20 for s in decoder['seeds'])==2 and sum(s==0 for s in decoder['seeds'])==2
    wrong = recorded('regions', 'decoder, masks of others', 'small regions', 'iou_gain')
    mirror, flipped = (recorded('mirror', row, 'two-sided')['points'] for row in ('SSAA', 'flipped top to bottom'))
    worse = {c: [-recorded('quality', row, c)['points']['value'] for row in ('mapping', 'shuffled quality', 'label SVR')]
        for c in ('degraded alike', 'degraded widely')}
    by = {c: f'{c} by {min(w):.1f} to {max(w):.1f}' for c, w in worse.items()}
    codec = {row: [recorded('codec', row, c) for c in ('as trained', 'at c40')] for row in ('plain, degraded', 'agreement', 'without agreement')}
    lost = [f"{100*(before['value']-after['value']):.0f}" for before, after in codec.values()]
    visible = codec['plain, degraded'][1]['visible']
    tables = [read_record(RESULTS/f'table-{t.name}.json') for t in CONDITION_TABLES]
    trials = {(r['row'], r['column']): p_value(r['difference']) for t in tables for r in t['results'] if r['metric']=='auc' and r['row'] in t['controls']}
    mirror_p = dict(zip(trials, holm(list(trials.values()))))['SSAA', 'london, one-sided']
    assert len(trials)==11
    return [('32_local_similarity', f'two of five trainings learned to mark the forgery, one a little, and two marked nothing: {gained} on average'),
        ('32_local_similarity', f"never gets beyond {np.ceil(100*max(wrong['seeds'])-.5):.0f}"), ('tutorials/what_helps', f'two of five trainings learned it, one a little and two not at all: {gained} of IoU'),
        ('20_ssaa', f"by {mirror['value']:+.1f} points [{mirror['low']:+.1f}, {mirror['high']:+.1f}], where the control has {flipped['value']:+.1f}"),
        ('23_deepfidelity', f"{by['degraded alike']} points, {by['degraded widely']}"),
        ('41_lisiam', f'the plain network some {lost[0]} points, the other two {lost[1]} and {lost[2]}: no difference could be seen, and one of {visible:.1f} points would have been'),
        ('57_experiments_lisiam', f'only a gain of {visible:.1f} points would have been seen'),
        ('tutorials/what_helps', f"eleven comparisons were made: corrected for their number (Holm), the mirror's gain has a $p$ of {mirror_p:.2f}")]

@pytest.mark.parametrize('k', range(8))
def test_numbers_in_words_are_those_of_the_record(k):
    notebook, words = typed_sentences()[k]
    cells = json.loads((RESULTS.parent/f'{notebook}.ipynb').read_text())['cells']
    assert any(words in ' '.join(''.join(c['source']).split()) for c in cells if c['cell_type']=='markdown'), words

def test_the_weight_of_the_bundled_mirror_is_the_one_in_words():
    "README and lesson 20 say how much the bundled DeepFidelity uses its mirror"
    import deepfid
    from deepfid.experiments.deepfidelity import mirror_weights
    words = f"{mirror_weights(deepfid.load('deepfidelity'))['w2 of block 1']:.2f}"
    for file, sentence in (('index', f'hardly uses its mirror ($w_2$ is {words})'), ('20_ssaa', f'there $w_2$ of the first block came to {words}')):
        assert sentence in (RESULTS.parent/f'{file}.ipynb').read_text().replace('\\n', ' '), sentence
