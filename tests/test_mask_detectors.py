"The two detectors with masks: what they are made of, what they keep, what they refuse"
import numpy as np, pytest, torch
from deepfid.core import DeepfidError, ManifestError, WeightsError
from deepfid.data.manifest import Manifest
from deepfid.data.pairs import map_images
from deepfid.data.loaders import dataloaders
from deepfid.models.lisiam.detector import CLASSIFICATION_MODULES, SEGMENTATION_MODULES, LiSiam, split_epochs
from deepfid.models.lisiam.network import LISIAM_ABLATIONS
from deepfid.models.local_similarity.detector import LocalSimilarity, similarity_figure
from deepfid.models.local_similarity.llsm import LLSM, pair_target, sample_positions
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

# -- predictions, and what is kept --
def test_similarity_predicts_three_things(similarity, faces):
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
    assert np.allclose([p.fidelity for p in again.predict(images, 2)], f, atol=1e-5) and again.threshold==d.threshold and again.validated_ranges==d.validated_ranges
    halved = type(d).load(d.save(tmp_path/'h', half=True))
    assert np.allclose([p.fidelity for p in halved.predict(images)], f, atol=2e-2)
    assert (tmp_path/'h'/'network.safetensors').stat().st_size<.6*(tmp_path/'d'/'network.safetensors').stat().st_size
    assert d.features(images).shape[0]==6 and d.predict([])==[]

def test_another_detectors_folder_is_refused(similarity, tmp_path):
    similarity.save(tmp_path/'d')
    with pytest.raises(WeightsError, match="is a 'local_similarity' detector"): LiSiam.load(tmp_path/'d')

def test_figure(similarity, faces):
    test = faces.of('test')
    im = similarity_figure(similarity, test_images(faces)[:3], [test.mask(i) for i in range(3)], 'abc')
    assert im.ndim==3 and im.shape[1]>3*64 and im.shape[0]>5*64
    with pytest.raises(DeepfidError, match='to show'):
        similarity_figure(LocalSimilarity(use_flm=False, **SMALL).configure('tiny'), test_images(faces)[:1], [test.mask(0)], 'a')

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

# -- positions --
def test_sampled_positions_are_those_of_the_full_matrix():
    llsm, x = LLSM(8).eval(), torch.randn(2, 8, 6, 6)
    mask = torch.zeros(2, 1, 36, 36); mask[0, :, :12] = 1
    positions = sample_positions(mask, 6, 10)
    full, part, want, some = llsm(x), llsm(x, positions), pair_target(mask, 6), pair_target(mask, 6, positions=positions)
    for b in range(2):
        i = positions[b]
        assert len(set(i.tolist()))==10 and torch.allclose(part[b], full[b][i][:, i], atol=1e-5) and torch.equal(some[b], want[b][i][:, i])
    assert some[0].mean()==.5 and some[1].sum()==0

def test_few_forged_positions_are_all_taken():
    mask = torch.zeros(1, 1, 8, 8); mask[0, 0, 0, :2] = 1
    chosen = sample_positions(mask, 8, 10)[0].tolist()
    assert {0, 1}<=set(chosen) and len(set(chosen))==10 and len(sample_positions(mask, 8, 999)[0])==64

def test_sampling_only_in_training(faces):
    d = LocalSimilarity(sample=4, epochs=1, **SMALL).configure('tiny')
    learn, seen = d.learner(d.loaders(faces)), []
    d.model.register_forward_hook(lambda m, a, out: seen.append((m.training, out.similarity_logits.shape[1])))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert {n for training, n in seen if training}=={4} and {n for training, n in seen if not training}=={16}

# -- three phases --

@pytest.mark.parametrize('n', [3, 4, 8, 50, np.int64(9)])
def test_epochs_are_split(n): assert min(split_epochs(n))>=1 and sum(split_epochs(n))==n

@pytest.mark.parametrize('epochs', [1, 2, (), (1, 2), (1, 0, 1), 8., None])
def test_epochs_that_cannot_be_split_are_refused(epochs):
    with pytest.raises(DeepfidError, match='epochs'): LiSiam(epochs=epochs).configure('tiny')

@pytest.mark.parametrize('epochs', [(), (1, 2), None])
def test_similarity_has_one_number_of_epochs(epochs):
    with pytest.raises(DeepfidError, match='epochs='): LocalSimilarity(epochs=epochs).configure('tiny')

@pytest.mark.parametrize('phase, modules', [(0, SEGMENTATION_MODULES), (2, SEGMENTATION_MODULES+CLASSIFICATION_MODULES)])
def test_a_phase_trains_its_own_modules(faces, phase, modules):
    d = LiSiam(ema=None, **SMALL).configure('tiny')
    before = {k: v.clone() for k, v in d.model.state_dict().items()}
    learn = d.learner(d.loaders(faces), phase=phase)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert {k.split('.')[0] for k, v in d.model.state_dict().items() if not torch.equal(v, before[k])}==set(modules)
    assert all(p.requires_grad for p in d.model.parameters())

def test_degradations_of_an_epoch_are_its_own(Callback, faces):
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

def test_agreement_of_weight_0_is_the_training_without_it(faces):
    "Both branches run, and only the loss that ties them is gone"
    dls = dataloaders(faces, 'label+mask', size=64, bs=4, seed=0)
    def step(**settings):
        d = LiSiam(**SMALL, **settings).configure('tiny')
        learn = d.learner(dls)
        for cb in learn.cbs: cb.learn = learn
        torch.manual_seed(0)
        clean = torch.rand(4, 3, 64, 64)
        degraded, y = clean*.9, (torch.tensor([1, 0, 1, 0]), torch.zeros(4, 1, 64, 64))
        degraded.requires_grad_()
        learn.model.eval() # in training, the branches meet in the batch norms too
        loss = learn.loss_func(learn.model(clean, degraded), y)
        return loss.item(), {k: v.item() for k, v in learn.loss_func.terms.items()}, torch.autograd.grad(loss, degraded, allow_unused=True)[0].abs().max().item()
    (tied, terms, gradient), (loose, same, none) = step(), step(w_li=0.)
    assert terms['li']>0 and terms==pytest.approx(same) and tied-loose==pytest.approx(terms['li'], rel=1e-3)
    assert gradient>0 and none==0

def test_one_cycle_leaves_the_momentum_of_sgd(Callback, faces):
    seen = []
    class Momentum(Callback):
        def after_batch(self):
            if self.training: seen.append(self.opt.hypers[-1]['mom'])
    LiSiam(epochs=(1, 1, 1), opt='SGD', momentum=.9, schedule='one-cycle', **SMALL).fit(faces, 'tiny', cbs=[Momentum()])
    assert set(seen)=={.9}

def test_a_manifest_that_is_refused_leaves_the_trained_network(faces):
    d = LocalSimilarity(epochs=1, **SMALL).fit(faces, 'tiny')
    before = d.predict(test_images(faces))[0].fidelity
    with pytest.raises(ManifestError, match="'valid' has no faces"): d.fit(faces.where(split=['train', 'test']), 'tiny')
    assert d.predict(test_images(faces))[0].fidelity==before

@pytest.mark.parametrize('variant', 'CEFG') # one phase, one degraded branch, no transformer, mixed; A is the fixture
def test_every_variant_trains(faces, variant):
    d = LiSiam(ablation=variant, epochs=(1, 1, 1), **SMALL).fit(faces, 'tiny')
    learned = {k.removeprefix('train_') for h in d.history for k in h if k.startswith('train_')}-{'loss', 'auc'}
    assert learned==set(LISIAM_ABLATIONS[variant]['terms'])
    p, = d.predict(test_images(faces)[:1])
    assert (p.mask is None)==(not any(t.startswith('seg') for t in learned))

def test_interrupted_between_and_inside_phases(Callback, faces, tmp_path):
    class Cut(Callback):
        order = 95
        def __init__(self, phase, epoch): self.at = phase, epoch
        def after_epoch(self):
            if (self.learn.loss_func.names==('cls1',), self.epoch)==self.at: raise KeyboardInterrupt
    kw = dict(epochs=(1, 2, 1), seed=5, **SMALL)
    for cut in (Cut(False, 0), Cut(True, 0)): # after the first phase, and within the second
        with pytest.raises(KeyboardInterrupt): LiSiam(**kw).fit(faces, 'tiny', cbs=[cut], resume=tmp_path/'s')
    resumed, whole = LiSiam(**kw).fit(faces, 'tiny', resume=tmp_path/'s'), LiSiam(**kw).fit(faces, 'tiny')
    assert max((a.float()-b.float()).abs().max().item() for a, b in zip(resumed.model.state_dict().values(), whole.model.state_dict().values()))<1e-5
    with pytest.raises(DeepfidError, match='li_on'): LiSiam(li_on='prob', **kw).fit(faces, 'tiny', resume=tmp_path/'s')

# -- Learnable Local Similarity on another backbone --
LITE0 = dict(backbone='efficientnet_lite0', pretrained=False, steps=2, bs=8, epochs=1, **SMALL)
PLAIN = dict(use_llsm=False, use_flm=False)

@pytest.mark.parametrize('kw', [{}, PLAIN], ids=['full', 'plain'])
def test_lite0_from_training_to_files(kw, faces, tmp_path):
    from deepfid.explain import detector_grad_cam
    manifest = Manifest(faces.table.assign(mask=''), faces.folder, 'x') if kw else faces # the plain network learns no masks
    d, images = LocalSimilarity(**LITE0, **kw).fit(manifest, 'tiny', 'finetune', resume=tmp_path/'r'), test_images(faces)
    assert (d.config.cls_from, d.config.ema, d.config.lr, d.size)==('encoder', .995, 1e-3, 64)
    assert {k.removeprefix('train_') for k in d.history[0] if k.startswith('train_')}=={'loss', 'cls', 'auc'}|(set() if kw else {'ls', 'loc'})
    predictions = d.predict(images)
    assert (predictions[0].mask is None)==(predictions[0].similarity is None)==bool(kw)
    f, again = [p.fidelity for p in predictions], LocalSimilarity.load(d.save(tmp_path/'d'))
    assert np.array_equal([p.fidelity for p in again.predict(images)], f) and again.config==d.config
    halved = LocalSimilarity.load(d.save(tmp_path/'h', half=True))
    assert np.allclose([p.fidelity for p in halved.predict(images)], f, atol=2e-2) and (tmp_path/'h'/'network.safetensors').stat().st_size<12e6
    cams = detector_grad_cam(d, images[:2], d.explain_layer, d.fake_logit)
    assert cams.shape==(2, 2, 2) and np.isfinite(cams).all()
    other = LocalSimilarity(use_llsm=False, **SMALL).configure('tiny').save(tmp_path/'o')
    (tmp_path/'o'/'detector.json').write_text((tmp_path/'o'/'detector.json').read_text().replace('"backbone": "xception"', '"backbone": "efficientnet_lite0"'))
    with pytest.raises(WeightsError, match='weights of another network'): LocalSimilarity.load(other)

def test_start_from_a_file(faces, tmp_path):
    import timm
    from deepfid.io import read_json, save_safetensors
    whole, path = timm.create_model('tf_efficientnet_lite0'), tmp_path/'start.safetensors'
    save_safetensors(path, whole.state_dict())
    d = LocalSimilarity(weights=path, **LITE0, **PLAIN).configure('tiny', 'finetune')
    assert torch.equal(d.model.backbone.conv_stem.weight, whole.conv_stem.weight) and torch.equal(d.model.encoder_head.bn2.bias, whole.bn2.bias)
    f = d.predict(test_images(faces))[0].fidelity
    d.save(tmp_path/'d'); path.unlink()
    assert read_json(tmp_path/'d'/'detector.json', WeightsError)['config']['weights']=='start.safetensors' # no folders of this computer
    again = LocalSimilarity.load(tmp_path/'d')
    assert again.predict(test_images(faces))[0].fidelity==f and 'weights' not in again.settings # its training would look for that name
    with pytest.raises(WeightsError, match='no such file'): LocalSimilarity(weights=path, **LITE0).configure('tiny')
    save_safetensors(path, timm.create_model('resnet18').state_dict())
    with pytest.raises(WeightsError, match='conv_stem.weight.*do not fit'): LocalSimilarity(weights=path, **LITE0).configure('tiny')

@pytest.mark.parametrize('kw, cls_from, layer', [({}, 'decoder', 'backbone.bn4'), (dict(backbone='resnet18'), 'encoder', 'encoder_head'), (dict(backbone='resnet18', cls_from='decoder'), 'decoder', 'decoder.bottom')])
def test_classifier_and_grad_cam_by_backbone(kw, cls_from, layer):
    d = LocalSimilarity(pretrained=False, **kw, **SMALL).configure('tiny')
    assert (d.config.cls_from, d.explain_layer)==(cls_from, layer) and layer in dict(d.model.named_modules())

@pytest.mark.parametrize('kw, message', [(dict(backbone='resnet5000'), "no backbone 'resnet5000'"), (dict(backbone=3), "no backbone '3'"), (dict(cls_from='head'), "cls_from='head'")])
def test_backbones_refused(kw, message):
    with pytest.raises(DeepfidError, match=message): LocalSimilarity(**kw, **SMALL).configure('tiny')

# -- refused --
@pytest.mark.parametrize('make, message', [
    (lambda: LocalSimilarity(beta=-1.).configure('tiny'), 'beta=-1.0: give a number from 0 up to 1'), (lambda: LocalSimilarity(metric='L2').configure('tiny'), "'cosine'"),
    (lambda: LocalSimilarity(epochs=0).configure('tiny'), 'from 1'), (lambda: LocalSimilarity(sample=1).configure('tiny'), 'sample=1: give a whole number from 2'), (lambda: LocalSimilarity(hidden=2.5).configure('tiny'), 'hidden=2.5'), (lambda: LocalSimilarity(alpha=None).configure('tiny'), 'alpha=None'), (lambda: LocalSimilarity(use_llsm='no').configure('tiny'), "use_llsm='no': give True or False"),
    (lambda: LocalSimilarity(colour=1).configure('tiny'), "no setting 'colour'"), (lambda: LocalSimilarity(size=20).configure('tiny'), 'size=20: give a whole number from 39'),
    (lambda: LiSiam(ablation='Z').configure('tiny'), "'A'"), (lambda: LiSiam(epochs=(1, 1)).configure('tiny'), 'three phases'), (lambda: LiSiam(p=2.).configure('tiny'), 'p'),
    (lambda: LiSiam(scu='dense', recipe=1).configure('tiny'), "no setting 'recipe'"), (lambda: LiSiam().configure('tiny', 'best'), "recipe='best': choose")])
def test_settings_refused(make, message):
    with pytest.raises(DeepfidError, match=message): make()

@pytest.mark.parametrize('wrong', [dict(bs=0), dict(lr='a'), dict(lr=-1), dict(lr=0), dict(epochs=1.5), dict(epochs='many'), dict(amp='int8'), dict(ema=3), dict(seed=-1), dict(size='big'), dict(clip=float('nan'))])
@pytest.mark.parametrize('kind', [LocalSimilarity, LiSiam])
def test_numbers_refused(kind, wrong):
    with pytest.raises(DeepfidError, match=f'^{next(iter(wrong))}='): kind(**wrong).configure('tiny')

def test_faces_of_floats_are_refused(similarity):
    with pytest.raises(DeepfidError, match='face 1: give an RGB image.* not float64'): similarity.predict([np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3))])
    for shape in ((64, 64), (64, 64, 4), (0, 0, 3)):
        with pytest.raises(DeepfidError, match='face 0: give an RGB image'): similarity.predict([np.zeros(shape, np.uint8)])
    assert similarity.predict([])==[] and similarity.features([]).shape==(0, similarity.features([np.zeros((64, 64, 3), np.uint8)]).shape[1])

@pytest.mark.parametrize('kind', [LocalSimilarity, LiSiam])
@pytest.mark.parametrize('change, message', [
    (lambda t: t.assign(mask=''), 'mask'), (lambda t: t[t['label']==1], 'only real'), (lambda t: t[t['split']!='valid'], "'valid' has no faces")])
def test_faces_refused(kind, change, message, faces):
    with pytest.raises(ManifestError, match=message): kind(epochs=3, **SMALL).fit(Manifest(change(faces.table), faces.folder, 'x'), 'tiny')

def test_real_faces_with_masks_are_refused(faces):
    t = faces.table.copy()
    t.loc[t['label']==1, 'mask'] = t['mask'][t['label']==0].iloc[0]
    for kind in (LocalSimilarity, LiSiam):
        with pytest.raises(DeepfidError, match='real face'): kind(epochs=3, **SMALL).fit(Manifest(t, faces.folder, 'x'), 'tiny')

# -- loaders and changed images --
def test_steps(faces):
    dls = dataloaders(faces, 'label+mask', bs=8, steps=11)
    assert len(dls.train)==11 and sum(1 for _ in dls.train)==11

def test_changed_images(faces, tmp_path):
    dark = map_images(faces, lambda im: im//2, tmp_path/'dark')
    assert np.array_equal(dark.image(1), faces.image(1)//2) and np.array_equal(dark.mask(1), faces.mask(1)) and dark.table['quality'].isna().all()
    assert dark.key()!=faces.key() and dark.key()!=map_images(faces, lambda im: im//3, tmp_path/'darker').key()
    def bad(im): raise RuntimeError
    with pytest.raises(RuntimeError): map_images(faces, bad, tmp_path/'bad')
    assert not (tmp_path/'bad').exists()

def test_full_trains_as_the_paper_does_by_default():
    c = LocalSimilarity().resolve_config('full')
    assert (c.recipe, c.opt, c.lr, c.bs, c.steps)==('paper', 'Adam', 1e-4, 32, 200)
    assert LocalSimilarity().resolve_config('tiny').recipe==LocalSimilarity().resolve_config('full', 'ours').recipe==LiSiam().resolve_config('tiny').recipe=='ours'
    assert LiSiam().resolve_config('full').recipe=='paper' and LiSiam().resolve_config('full').opt=='SGD'
