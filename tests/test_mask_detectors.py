"The two detectors with masks: what they are made of, what they keep, what they refuse; and the tables that compare them"
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from deepfid.models.backbones import xception
from deepfid.core import DeepfidError, ManifestError, Prediction, WeightsError, read_json, write_json
from deepfid.data.manifest import Manifest, changed, dataloaders
from deepfid.evaluate.metrics import MetricError, video_scores
from deepfid.experiments.runner import Column, Row, Table, TableRun, score_mask
from deepfid.models.lisiam.detector import CLASSIFIES, LOCATES, LiSiam, poly, three_phases
from deepfid.models.lisiam.network import ABLATIONS
from deepfid.models.local_similarity.detector import LocalSimilarity, SamplePlaces, similarity_picture
from deepfid.models.local_similarity.llsm import LLSM, pair_target, sample_places
from deepfid.models.local_similarity.decoder import SimilarityNet, similarity_losses
from deepfid.experiments import deepfidelity as D, lisiam as T, local_similarity as S
from deepfid.experiments.catalogue import TABLES
from deepfid.testing import tiny_manifest

SMALL = dict(size=64)

@pytest.fixture(scope='module')
def faces(): return tiny_manifest((16, 8, 10), 64)

@pytest.fixture(scope='module')
def similarity(faces): return LocalSimilarity(epochs=1, **SMALL).fit(faces, 'tiny')

@pytest.fixture(scope='module')
def lisiam(faces): return LiSiam(epochs=(1, 1, 1), **SMALL).fit(faces, 'tiny')

def test_images(faces): return [faces.of('test').image(i) for i in range(6)]
test_images.__test__ = False

# -- what they say, and keep --
def test_similarity_says_three_things(similarity, faces):
    p = similarity.predict(test_images(faces))
    assert all(0<=q.fidelity<=1 and q.mask.shape==(64, 64) and q.similarity.shape==(16, 16) for q in p)
    assert {'train_cls', 'train_ls', 'train_loc', 'valid_auc'}<=set(similarity.history[0])

@pytest.mark.parametrize('kw, mask, pairs', [(dict(use_llsm=False), True, False), (dict(use_flm=False), False, True), (dict(use_llsm=False, use_flm=False), False, False)])
def test_switches(faces, kw, mask, pairs):
    d = LocalSimilarity(**kw, **SMALL).configure('tiny')
    p, = d.predict(test_images(faces)[:1])
    assert (p.mask is not None, p.similarity is not None)==(mask, pairs)
    learn = d.learner(d.loaders(faces))
    assert [m.name for m in learn.metrics]==['cls']+['ls']*pairs+['loc']*mask+['auc']

@pytest.mark.parametrize('name', ['similarity', 'lisiam'])
def test_from_disk_and_in_other_batches(name, request, faces, tmp_path):
    d, images = request.getfixturevalue(name), test_images(faces)
    f = np.array([p.fidelity for p in d.predict(images)])
    again = type(d).load(d.save(tmp_path/'d'))
    assert np.allclose([p.fidelity for p in again.predict(images, 2)], f, atol=1e-5) and again.threshold==d.threshold and again.trust==d.trust
    halved = type(d).load(d.save(tmp_path/'h', half=True))
    assert np.allclose([p.fidelity for p in halved.predict(images)], f, atol=2e-2)
    assert (tmp_path/'h'/'network.safetensors').stat().st_size<.6*(tmp_path/'d'/'network.safetensors').stat().st_size
    assert d.features(images).shape[0]==6 and d.predict([])==[]

def test_another_detectors_folder_is_refused(similarity, tmp_path):
    similarity.save(tmp_path/'d')
    with pytest.raises(WeightsError, match="is a 'local_similarity' detector"): LiSiam.load(tmp_path/'d')

def test_picture(similarity, faces):
    test = faces.of('test')
    im = similarity_picture(similarity, test_images(faces)[:3], [test.mask(i) for i in range(3)], 'abc')
    assert im.ndim==3 and im.shape[1]>3*64 and im.shape[0]>5*64
    with pytest.raises(DeepfidError, match='nothing to show'):
        similarity_picture(LocalSimilarity(use_flm=False, **SMALL).configure('tiny'), test_images(faces)[:1], [test.mask(0)], 'a')

def test_hub(similarity, faces, tmp_path, monkeypatch):
    import huggingface_hub, shutil
    kept = tmp_path/'hub'
    class Api:
        def __init__(self, token=None): pass
        def create_repo(self, name, **k): return type('Repo', (), dict(repo_id=name))
        def upload_folder(self, repo_id, folder_path, **k): return shutil.copytree(folder_path, kept/repo_id)
    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda name, **k: str(kept/name))
    similarity.push_to_hub('me/mine')
    again = LocalSimilarity.from_pretrained('me/mine')
    images = test_images(faces)
    assert np.allclose([p.fidelity for p in again.predict(images)], [p.fidelity for p in similarity.predict(images)], atol=2e-2)
    def gone(name, **k): raise OSError('offline\nmore')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', gone)
    with pytest.raises(WeightsError, match='offline'): LocalSimilarity.from_pretrained('me/mine')
    with pytest.raises(WeightsError, match="is a 'local_similarity'"): LiSiam.from_pretrained(str(kept/'me/mine'))

# -- places --
def test_sampled_places_are_those_of_the_full_map():
    llsm, x = LLSM(8).eval(), torch.randn(2, 8, 6, 6)
    mask = torch.zeros(2, 1, 36, 36); mask[0, :, :12] = 1
    places = sample_places(mask, 6, 10)
    full, part, want, some = llsm(x), llsm(x, places), pair_target(mask, 6), pair_target(mask, 6, places=places)
    for b in range(2):
        i = places[b]
        assert len(set(i.tolist()))==10 and torch.allclose(part[b], full[b][i][:, i], atol=1e-5) and torch.equal(some[b], want[b][i][:, i])
    assert some[0].mean()==.5 and some[1].sum()==0

def test_few_forged_places_are_all_taken():
    mask = torch.zeros(1, 1, 8, 8); mask[0, 0, 0, :2] = 1
    chosen = sample_places(mask, 8, 10)[0].tolist()
    assert {0, 1}<=set(chosen) and len(set(chosen))==10 and len(sample_places(mask, 8, 999)[0])==64

def test_sampling_only_in_training(faces):
    d = LocalSimilarity(sample=4, epochs=1, **SMALL).configure('tiny')
    learn, seen = d.learner(d.loaders(faces)), []
    d.model.register_forward_hook(lambda m, a, out: seen.append((m.training, out.pairs.shape[1])))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert {n for training, n in seen if training}=={4} and {n for training, n in seen if not training}=={16}

# -- three phases --
def test_poly_endpoints(): assert poly(.002)(0.)==pytest.approx(.002) and poly(.002)(1.)==pytest.approx(.00002)

@pytest.mark.parametrize('n', [1, 2, 3, 8, 50])
def test_epochs_are_shared_out(n): assert min(three_phases(n))>=1 and (sum(three_phases(n))==n or n<3)

@pytest.mark.parametrize('phase, learns', [(0, LOCATES), (1, CLASSIFIES), (2, LOCATES+CLASSIFIES)])
def test_a_phase_moves_its_own(faces, phase, learns):
    d = LiSiam(ema=None, **SMALL).configure('tiny')
    before = {k: v.clone() for k, v in d.model.state_dict().items()}
    learn = d.learner(d.loaders(faces), phase=phase)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert {k.split('.')[0] for k, v in d.model.state_dict().items() if not torch.equal(v, before[k])}==set(learns)
    assert all(p.requires_grad for p in d.model.parameters())

def test_degradations_of_an_epoch_are_its_own(faces):
    d = LiSiam(**SMALL).configure('tiny')
    def batches():
        learn, seen = d.learner(d.loaders(faces), phase=2), []
        class Look(Callback):
            order = 6
            def before_batch(self):
                if self.training: seen.append(self.xb[1].clone())
        learn.add_cb(Look())
        learn.dls.train.epoch = 0
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return torch.cat(seen)
    assert torch.equal(batches(), batches())

@pytest.mark.parametrize('variant', ABLATIONS)
def test_every_variant_trains(faces, variant):
    d = LiSiam(variant, epochs=(1, 1, 1), **SMALL).fit(faces, 'tiny')
    learnt = {k.removeprefix('train_') for h in d.history for k in h if k.startswith('train_')}-{'loss', 'auc'}
    assert learnt==set(ABLATIONS[variant]['terms'])
    p, = d.predict(test_images(faces)[:1])
    assert (p.mask is None)==(not any(t.startswith('seg') for t in learnt))

def test_interrupted_between_and_inside_phases(faces, tmp_path):
    class Cut(Callback):
        order = 95
        def __init__(self, phase, epoch): self.at = phase, epoch
        def after_epoch(self):
            if (self.learn.loss_func.terms==('cls1',), self.epoch)==self.at: raise KeyboardInterrupt
    kw = dict(epochs=(1, 2, 1), seed=5, **SMALL)
    for cut in (Cut(False, 0), Cut(True, 0), Cut(True, 1)):
        with pytest.raises(KeyboardInterrupt): LiSiam(**kw).fit(faces, 'tiny', cbs=[cut], resume=tmp_path/'s')
    resumed, whole = LiSiam(**kw).fit(faces, 'tiny', resume=tmp_path/'s'), LiSiam(**kw).fit(faces, 'tiny')
    assert max((a.float()-b.float()).abs().max().item() for a, b in zip(resumed.model.state_dict().values(), whole.model.state_dict().values()))<1e-5
    with pytest.raises(DeepfidError, match='li_on'): LiSiam(li_on='prob', **kw).fit(faces, 'tiny', resume=tmp_path/'s')

# -- refused --
@pytest.mark.parametrize('make, says', [
    (lambda: LocalSimilarity(beta=-1.).configure('tiny'), 'between 0 and 1'), (lambda: LocalSimilarity(metric='L2').configure('tiny'), "'cosine'"),
    (lambda: LocalSimilarity(epochs=0).configure('tiny'), 'at least one'), (lambda: LocalSimilarity(sample=1).configure('tiny'), 'sample=1: give a whole number from 2'), (lambda: LocalSimilarity(hidden=2.5).configure('tiny'), 'hidden=2.5'), (lambda: LocalSimilarity(alpha=None).configure('tiny'), 'alpha=None'), (lambda: LocalSimilarity(use_llsm='no').configure('tiny'), "use_llsm='no': give True or False"),
    (lambda: LocalSimilarity(colour=1).configure('tiny'), "no setting 'colour'"), (lambda: LocalSimilarity(size=20).configure('tiny').predict([np.zeros((20, 20, 3), np.uint8)]), 'at least 39x39'),
    (lambda: LiSiam('Z').configure('tiny'), "'A'"), (lambda: LiSiam(epochs=(1, 1)).configure('tiny'), 'three phases'), (lambda: LiSiam(p=2.).configure('tiny'), 'p'),
    (lambda: LiSiam(scu='dense', recipe=1).configure('tiny'), "no setting 'recipe'"), (lambda: LiSiam().configure('tiny', 'best'), "no recipe 'best'")])
def test_settings_refused(make, says):
    with pytest.raises(DeepfidError, match=says): make()

@pytest.mark.parametrize('wrong', [dict(bs=0), dict(lr='a'), dict(lr=-1), dict(lr=0), dict(epochs=1.5), dict(epochs='many'), dict(amp='int8'), dict(ema=3), dict(seed=-1), dict(size='big'), dict(clip=float('nan'))])
@pytest.mark.parametrize('kind', [LocalSimilarity, LiSiam])
def test_numbers_refused(kind, wrong):
    with pytest.raises(DeepfidError, match=f'^{next(iter(wrong))}='): kind(**wrong).configure('tiny')

def test_faces_of_floats_are_refused(similarity):
    with pytest.raises(DeepfidError, match='face 1: is float64.*uint8'): similarity.predict([np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3))])

@pytest.mark.parametrize('kind', [LocalSimilarity, LiSiam])
@pytest.mark.parametrize('spoil, says', [
    (lambda t: t.assign(mask=''), 'mask'), (lambda t: t[t['label']==1], 'only real'), (lambda t: t[t['split']!='valid'], "'valid' has no faces")])
def test_faces_refused(kind, spoil, says, faces):
    with pytest.raises(ManifestError, match=says): kind(epochs=3, **SMALL).fit(Manifest(spoil(faces.table), faces.folder, 'x'), 'tiny')

def test_real_faces_with_masks_are_refused(faces):
    t = faces.table.copy()
    t.loc[t['label']==1, 'mask'] = t['mask'][t['label']==0].iloc[0]
    for kind in (LocalSimilarity, LiSiam):
        with pytest.raises(DeepfidError, match='real face'): kind(epochs=3, **SMALL).fit(Manifest(t, faces.folder, 'x'), 'tiny')

# -- loaders and changed faces --
def test_steps(faces):
    dls = dataloaders(faces, 'label+mask', bs=8, steps=11)
    assert len(dls.train)==11 and sum(1 for _ in dls.train)==11

def test_changed_faces(faces, tmp_path):
    dark = changed(faces, lambda im: im//2, tmp_path/'dark')
    assert np.array_equal(dark.image(1), faces.image(1)//2) and np.array_equal(dark.mask(1), faces.mask(1)) and dark.table['quality'].isna().all()
    assert dark.key()!=faces.key() and dark.key()!=changed(faces, lambda im: im//3, tmp_path/'darker').key()
    def bad(im): raise RuntimeError
    with pytest.raises(RuntimeError): changed(faces, bad, tmp_path/'bad')
    assert not (tmp_path/'bad').exists()

# -- tables --
def test_no_table_hides_another_of_the_same_name(): assert len(TABLES)==sum(len(m.TABLES) for m in (D, S, T))

def test_mask_scores():
    true = np.zeros((8, 8)); true[:4] = 1
    assert score_mask(true, true)==dict(iou=1., f1=1., pixel_auc=1.) and score_mask(true, np.zeros((8, 8))) is None
    assert score_mask(1-true, true)['iou']==0 and score_mask(np.kron(true, np.ones((2, 2))), true)['pixel_auc']==1

class Knows:
    "A detector that marks the left half of every face"
    name, threshold = 'knows', .5
    def __init__(self, seed=0, masks=True): self.masks = masks
    def fit(self, *a, **k): return self
    def save(self, folder): raise NotImplementedError
    def predict(self, faces, batch_size=32): return [Prediction(f.mean()/255, np.r_[[[1.]*32+[0.]*32]*64] if self.masks else None) for f in faces]

def test_masks_in_a_table(faces, tmp_path):
    table = Table('t', 't', [Row('with', Knows), Row('without', Knows, dict(masks=False))], lambda names: [Column('x', 'x', 'x', metrics=('auc', 'iou', 'pixel_auc'))])
    found = {(r['row'], r['metric']): r for r in TableRun(table, {'x': faces}, 2, 'tiny', tmp_path, lambda s: None).run().results(50)}
    test = faces.of('test')
    fakes = [i for i in range(len(test)) if test.table['label'].iloc[i]==0]
    want = np.mean([score_mask(Knows().predict([test.image(i)])[0].mask, test.mask(i))['iou'] for i in fakes])
    assert found['with', 'iou']['value']==pytest.approx(want) and found['with', 'iou']['faces']==len(fakes)
    assert found['without', 'iou']['value'] is None and found['without', 'auc']['value'] is not None

def test_by_forger(faces):
    parts = S.by_forger({'x': faces}, None)
    assert all(set(m.table['method'])=={'real', n.split(', ')[1]} and (m.table['label']==1).sum()==(m.table['label']==0).sum() for n, m in parts.items())
    assert len(S.forger_columns(['x', *parts]))==len(parts)**2

def test_by_forger_where_one_real_face_has_the_fakes_of_all(faces):
    t = faces.table.assign(pair=faces.table['identity'])
    t.loc[t.index[:2], 'pair'] = ''
    shared = Manifest(t, faces.folder, 'shared')
    for n, m in S.by_forger({'x': shared}, None).items():
        assert set(m.table['method'])=={'real', n.split(', ')[1]}
        fakes, reals = m.table[m.table['label']==0], m.table[m.table['label']==1]
        assert len(fakes)==(t['method']==n.split(', ')[1]).sum() and set(reals['pair'])<=set(fakes['pair'])

def test_compressed_levels(faces, tmp_path):
    one = faces.where(split='test')
    levels = T.compressed({'x': one}, tmp_path)
    lost = [np.abs(m.image(0).astype(int)-one.image(0)).mean() for m in levels.values()]
    assert lost[0]==0<lost[1]<lost[2] and len(T.across(['x', *levels]))==9

def test_masks_from_pictures(faces, tmp_path):
    made = T.with_masks({'x': faces}, tmp_path)
    t = made['x, SSIM'].check().table
    assert (t['mask'][t['split']=='test']==faces.table['mask'][t['split']=='test']).all()
    i = int(np.flatnonzero((t['label']==0)&(t['split']=='train'))[0])
    assert set(np.unique(made['x, SSIM'].mask(i)))<={0., 1.} and not np.array_equal(made['x, SSIM'].mask(i), made['x, DIFF'].mask(i))

def test_moving_faces(tmp_path):
    m = T.moving_faces(tmp_path/'m', (2, 2, 2), frames=3, size=64)
    t = m.of('test').table
    assert len(t)==12 and set(t['frame'])=={0, 1, 2} and T.moving_faces(tmp_path/'m').key()==m.key()
    table = Table('v', 'v', [Row('k', Knows)], lambda names: [Column('x', 'x', 'x', metrics=('video_auc', 'video_accuracy', 'video_auc_window'))])
    found = TableRun(table, {'x': m}, 1, 'tiny', tmp_path/'c', lambda s: None).run().results(50)
    assert all(r['value'] is not None for r in found)

def test_videos_need_their_column(faces, tmp_path):
    table = Table('v', 'v', [Row('k', Knows)], lambda names: [Column('x', 'x', 'x', metrics=('video_auc',))])
    with pytest.raises(DeepfidError, match='column `video`'): TableRun(table, {'x': faces}, 1, 'tiny', tmp_path, lambda s: None).run().results(10)

def test_window_finds_a_forged_stretch():
    fid = [.9]*10+[.9]*6+[.1]*4; keys = [('d', 'm', 'a')]*10+[('d', 'm', 'b')]*10
    v = video_scores(fid, [1]*20, keys, 'window', window=4)
    assert v.fidelity.tolist()==pytest.approx([.9, .1]) and video_scores(fid, [1]*20, keys, 'window', window=99).fidelity[1]==pytest.approx(np.mean(fid[10:]))
    with pytest.raises(MetricError): video_scores(fid, [1]*20, keys, 'window', window=0)

@pytest.mark.parametrize('name', list(T.SEEN|T.UNSEEN))
def test_damage_keeps_the_size(name, faces):
    im = faces.image(0)
    out = (T.SEEN|T.UNSEEN)[name](im)
    assert out.shape==im.shape and out.dtype==np.uint8 and not np.array_equal(out, im) and np.array_equal(out, (T.SEEN|T.UNSEEN)[name](im))

def test_evidence(similarity, faces):
    heard = S.Evidence(similarity, [0, 1, 2, 3]).fit(faces)
    p = heard.predict(test_images(faces))
    assert all(0<=q.fidelity<=1 and q.mask is not None for q in p)

def test_full_trains_as_the_paper_does_unless_told_otherwise():
    c = LocalSimilarity().settle('full')
    assert (c['recipe'], c['opt'], c['lr'], c['bs'], c['steps'])==('paper', 'Adam', 1e-4, 32, 200)
    assert LocalSimilarity().settle('tiny')['recipe']==LocalSimilarity().settle('full', 'ours')['recipe']==LiSiam().settle('full')['recipe']=='ours'
