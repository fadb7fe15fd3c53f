"DeepFidelity: training by three recipes, resuming, files, refitted regressions, several processes"
import json, os, shutil, subprocess, sys, textwrap
import cv2, numpy as np, pandas as pd, pytest, torch
from sklearn.linear_model import Ridge
from safetensors.torch import load_file, save_file
from deepfid.core import DeepfidError, ManifestError, WeightsError
from deepfid.data.loaders import FaceLoader, FaceDataset
from deepfid.data.manifest import Manifest
from deepfid.evaluate.metrics import auc
from deepfid.models.deepfidelity.detector import DeepFidelity
from deepfid.models.deepfidelity.recipes import DEEPFIDELITY_RECIPES, LR_SCHEDULES, TokenLoss, centre_crop, weight_decay_groups, five_epoch_warmup_schedule
from deepfid.models.deepfidelity.ssaaformer import SSAAFormer, TokenOutput

SMALL = dict(size=64, bs=20)

def write_pairs(folder, n=60, seed=0):
    "Pairs that differ in how sharp their middle is"
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        split = 'train' if i<n*5//9 else 'valid' if i<n*7//9 else 'test'
        real = cv2.GaussianBlur(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8), (0, 0), 1.)
        fake = real.copy()
        fake[16:48, 16:48] = cv2.GaussianBlur(real, (0, 0), 1.5)[16:48, 16:48]
        for label, image in ((1, real), (0, fake)):
            cv2.imwrite(str(folder/f'{i}_{label}.png'), image)
            rows.append(dict(path=f'{i}_{label}.png', label=label, identity=f'p{i}', split=split, pair=str(i), quality=rng.normal(), method='real' if label else 'blur'))
    return Manifest(pd.DataFrame(rows), folder).check()

@pytest.fixture(scope='module')
def manifest(tmp_path_factory): return write_pairs(tmp_path_factory.mktemp('pairs'))

@pytest.fixture(scope='module')
def trained(manifest): return DeepFidelity(epochs=6, ema=.8, **SMALL).fit(manifest, 'tiny')

def images(manifest, split='test'):
    part = manifest.of(split)
    return [part.image(i) for i in range(len(part))]

def scores(detector, manifest): return np.array([p.fidelity for p in detector.predict(images(manifest))])

# -- scores and files --
def test_it_learns(manifest, trained): assert auc(scores(trained, manifest), manifest.of('test').table['label'].to_numpy())>.75

def test_threshold_is_where_probability_is_half(manifest, trained):
    np.testing.assert_array_equal(trained.predict_proba(images(manifest))>=.5, scores(trained, manifest)>=trained.threshold)

def test_same_seed_same_scores(manifest):
    a, b, c = (scores(DeepFidelity(epochs=1, seed=s, **SMALL).fit(manifest, 'tiny'), manifest) for s in (3, 3, 4))
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert np.abs(a-c).max()>1e-3

def test_saved_and_loaded_scores_agree(manifest, trained, tmp_path):
    trained.save(tmp_path/'d')
    again = DeepFidelity.load(tmp_path/'d')
    np.testing.assert_allclose(scores(again, manifest), scores(trained, manifest), atol=1e-6)
    assert again.threshold==trained.threshold and not list((tmp_path/'d').rglob('*.pkl'))

def test_head_alone_is_a_probability(manifest):
    plain = scores(DeepFidelity(epochs=1, mapping=None, ssaa_blocks=0, **SMALL).fit(manifest, 'tiny'), manifest)
    assert 0<=plain.min() and plain.max()<=1

@pytest.mark.parametrize('damage, says', [
    (lambda d: (d/'network.safetensors').unlink(), 'no such file'),
    (lambda d: (d/'network.safetensors').write_bytes((d/'network.safetensors').read_bytes()[:-1]+b'!'), 'sha256'),
    (lambda d: (d/'detector.json').unlink(), 'detector.json'),
    (lambda d: (d/'detector.json').write_text('{'), 'detector.json'),
    (lambda d: (d/'detector.json').write_text('{}'), 'detector.json'),
    (lambda d: (d/'regressor'/'regressor.safetensors').unlink(), 'regressor.safetensors'),
    (lambda d: (d/'detector.json').write_text((d/'detector.json').read_text().replace('ssaaformer_tiny', 'ssaaformer_small')), 'network'),
], ids=['no weights', 'changed weights', 'no settings', 'broken settings', 'empty settings', 'no regressor', 'another network'])
def test_bad_folder_is_refused_in_one_line(trained, tmp_path, damage, says):
    trained.save(tmp_path/'d')
    damage(tmp_path/'d')
    with pytest.raises(WeightsError, match=says) as e: DeepFidelity.load(tmp_path/'d')
    assert '\n' not in str(e.value)

def test_wrong_shape_is_named(trained, tmp_path):
    from deepfid.io import file_hash
    trained.save(tmp_path/'d')
    path = tmp_path/'d'/'network.safetensors'
    weights = load_file(path)
    weights['head.weight'] = weights['head.weight'][:1]
    save_file(weights, path)
    about = json.loads((tmp_path/'d'/'detector.json').read_text())
    (tmp_path/'d'/'detector.json').write_text(json.dumps(about | dict(sha256=file_hash(path))))
    with pytest.raises(WeightsError, match='head.weight has shape'): DeepFidelity.load(tmp_path/'d')

def test_unknown_settings_are_refused():
    with pytest.raises(DeepfidError, match='epoch_count'): DeepFidelity(epoch_count=3).configure('tiny')
    with pytest.raises(DeepfidError, match='recipe'): DeepFidelity().configure('tiny', recipe='none')
    with pytest.raises(DeepfidError, match='not trained'): DeepFidelity().predict([np.zeros((64, 64, 3), np.uint8)])
    with pytest.raises(DeepfidError, match='not trained'): DeepFidelity().save('nowhere')

def test_some_qualities_missing_is_refused_before_training(manifest):
    table = manifest.table.copy()
    table.loc[3, 'quality'] = np.nan
    with pytest.raises(DeepfidError, match='1 of 66 training faces have no quality'): DeepFidelity(epochs=1, **SMALL).fit(Manifest(table, manifest.folder), 'tiny')

def test_no_validation_rows_is_refused(manifest):
    with pytest.raises(ManifestError): DeepFidelity(epochs=1, **SMALL).fit(manifest.of('train'), 'tiny')

# -- the recipes --
@pytest.mark.parametrize('recipe', [r for r in DEEPFIDELITY_RECIPES if r not in ('ours', 'finetune')]) # 'ours' below, 'finetune' in test_lite0
def test_every_recipe_trains_and_comes_back_from_disk(manifest, recipe, tmp_path):
    d = DeepFidelity(epochs=1, **SMALL).fit(manifest, 'tiny', recipe)
    assert np.isfinite(scores(d, manifest)).all() and d.config.recipe==recipe
    d.save(tmp_path/'d')
    np.testing.assert_allclose(scores(DeepFidelity.load(tmp_path/'d'), manifest), scores(d, manifest), atol=1e-5)

def test_released_learning_rates(Callback, manifest):
    seen = []
    class Note(Callback):
        def after_batch(self):
            if self.training: seen.append((self.epoch, round(float(self.opt.hypers[0]['lr']), 8)))
    DeepFidelity(**SMALL).fit(manifest, 'tiny', 'released', cbs=[Note()])
    assert sorted(set(seen))==[(0, 1e-6), (1, 2.408e-4), (2, 4.806e-4)] # measured on the released code

def test_paper_reaches_its_learning_rate():
    at = LR_SCHEDULES['cosine'](1.2e-3, 20)
    assert max(at(p) for p in np.linspace(0, 1, 1001))==pytest.approx(1.2e-3) and at(1.)<2e-5

def test_warm_up_goes_on_as_a_cosine():
    at = five_epoch_warmup_schedule(1e-3, 20)
    assert at(5/20)>at(10/20)>at(19/20)>0

def test_released_network_has_its_quirks():
    d = DeepFidelity().configure('tiny', 'released')
    assert d.model.aux and d.model.mix_token and d.config.select=='test'
    d = DeepFidelity().configure('tiny', 'ours')
    assert not d.model.aux and not d.model.mix_token and d.config.select=='last'

def test_scales_and_mirror_weights_do_not_decay():
    net = SSAAFormer((1,1,1,1), (16,16,32,32), 16, layer_scale=1e-6)
    name = {id(p): n for n, p in net.named_parameters()}
    decayed = {how: {name[id(p)] for p in weight_decay_groups(net, how)[0]} for how in ('matrices', 'timm')}
    assert not any('gamma' in n or n.endswith(('.w', '.bias')) for n in decayed['matrices'])
    assert {n for n in decayed['timm']-decayed['matrices']}=={f'blocks{i}.0.gamma_{j}' for i in (1,2) for j in (1,2)}

def test_mixing_weights_have_a_learning_rate_of_their_own(manifest):
    moved = {}
    for factor in (0., 1., 50.):
        d = DeepFidelity(arch='ssaa_lite0', weights=None, mapping=None, regression='head', mirror_lr=factor, size=64, bs=20,
            epochs=1, steps=3, ema=None).fit(manifest, 'tiny', 'finetune')
        start = torch.tensor([1., 0.])
        moved[factor] = max((p.detach()-start).abs().max().item() for n, p in d.model.named_parameters() if n.endswith('.w'))
    assert moved[0.]==0 and 0<moved[1.]<.004 and moved[50.]>5*moved[1.]
    *decay, mixing = weight_decay_groups(d.model)
    assert len(mixing)==sum(n.endswith('.w') for n, _ in d.model.named_parameters())>0
    assert sum(map(len, decay))+len(mixing)==len([*d.model.parameters()])

def test_mixed_labels_have_no_gradient_at_the_truth():
    y, logits = torch.tensor([1, 0]), torch.zeros(2, 2, requires_grad=True)
    grad, = torch.autograd.grad(TokenLoss(0., True)(TokenOutput(logits, None, .5), y), logits)
    assert grad.abs().max()<1e-7
    grad, = torch.autograd.grad(TokenLoss(0., False)(TokenOutput(logits, None, .5), y), logits)
    assert grad.abs().max()>.1

def test_centre_crop_keeps_the_middle():
    x = torch.zeros(1, 3, 64, 64)
    x[..., 0, :] = 1.
    assert centre_crop(x, .8).max()<.5 and torch.equal(centre_crop(x, 1.), x)

def test_imagenet_augmentation_only_in_training(Callback, manifest):
    seen = {}
    class Look(Callback):
        order = 6
        def before_batch(self): seen.setdefault(self.training, self.xb[0].clone())
    DeepFidelity(epochs=1, augment='imagenet', **SMALL).fit(manifest, 'tiny', cbs=[Look()])
    plain = FaceLoader(FaceDataset(manifest.of('valid'), 'label', 64), 20).one_batch()[0]
    assert torch.equal(seen[False], plain) and seen[True].shape==plain.shape

def test_the_network_can_learn_the_targets_themselves(manifest):
    d = DeepFidelity(epochs=2, target='fidelity', regression='head', ema=.5, **SMALL).fit(manifest, 'tiny')
    assert d.regressor is None and d.model.num_classes==1 and len(d.history)==2
    both = d.refit(manifest, regression='svr')
    assert both.regressor is not None and np.abs(scores(both, manifest)-scores(d, manifest)).max()>1e-4

@pytest.mark.parametrize('asked, says', [(dict(target='score'), 'label'), (dict(regression='forest'), 'svr'), (dict(quality='beauty'), 'niqe'),
    (dict(target='fidelity', mapping=None), 'needs a mapping'), (dict(target='fidelity', select='valid'), "select='last'"), (dict(target='fidelity', network=dict(mix_token=True)), 'mix_token'), (dict(regression='head'), 'mapping=None'), (dict(amp='int4', epochs=1, size=64), 'bf16')])
def test_wrong_settings_are_refused(manifest, asked, says):
    with pytest.raises(DeepfidError, match=says) as e: DeepFidelity(**asked).fit(manifest, 'tiny')
    assert '\n' not in str(e.value)

def test_bf16_where_it_is_only_imitated_says_so(manifest, monkeypatch):
    monkeypatch.setattr('deepfid.models.callbacks.supports_bf16', lambda device: False)
    with pytest.warns(UserWarning, match="leave it out"): DeepFidelity(epochs=1, amp='bf16', **SMALL).fit(manifest, 'tiny')

def test_bf16_trains(manifest):
    d = DeepFidelity(epochs=1, amp='bf16', **SMALL).fit(manifest, 'tiny')
    assert np.isfinite(scores(d, manifest)).all() and next(d.model.parameters()).dtype==torch.float32

def test_weights_of_others_are_where_training_begins(manifest, trained, tmp_path):
    torch.save(dict(state_dict_ema=trained.model.state_dict()), tmp_path/'w.pth')
    d = DeepFidelity(weights=str(tmp_path/'w.pth')).configure('tiny')
    assert torch.equal(d.model.blocks1[0].conv1.weight, trained.model.blocks1[0].conv1.weight)
    assert not torch.equal(d.model.head.weight, trained.model.head.weight)

# -- interruption --
def power_cut(epoch):
    "A callback that interrupts a training at the end of `epoch`"
    from fastai.callback.core import Callback
    class PowerCut(Callback):
        order = 95
        def after_epoch(self):
            if self.epoch==epoch: raise KeyboardInterrupt
    return PowerCut()

@pytest.mark.parametrize('recipe', ['released'])
def test_resumed_equals_uninterrupted(manifest, recipe, tmp_path):
    make = lambda: DeepFidelity(epochs=2, **SMALL)
    whole = make().fit(manifest, 'tiny', recipe)
    with pytest.raises(KeyboardInterrupt): make().fit(manifest, 'tiny', recipe, cbs=[power_cut(0)], resume=tmp_path)
    resumed = make().fit(manifest, 'tiny', recipe, resume=tmp_path)
    for a, b in zip(resumed.model.state_dict().values(), whole.model.state_dict().values()): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(scores(resumed, manifest), scores(whole, manifest), atol=5e-3) # the solver's tolerance
    assert len(resumed.history)==2
    np.testing.assert_allclose([h['valid_loss'] for h in resumed.history], [h['valid_loss'] for h in whole.history], atol=1e-4)

def test_interrupted_in_the_middle_loses_one_epoch_at_most(Callback, manifest, tmp_path):
    steps = []
    class CutAt(Callback):
        def after_batch(self):
            if self.training: steps.append(self.epoch)
            if len(steps)==5: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): DeepFidelity(epochs=2, **SMALL).fit(manifest, 'tiny', cbs=[CutAt()], resume=tmp_path)
    steps.extend([9]*100)
    before = len(steps)
    DeepFidelity(epochs=2, **SMALL).fit(manifest, 'tiny', cbs=[CutAt()], resume=tmp_path)
    assert 1 in steps[before:] and 0 not in steps[before:] # the epoch that was cut is run again, the one before is not

@pytest.fixture(scope='module')
def stopped(manifest, tmp_path_factory):
    "Folder of a training of one epoch"
    DeepFidelity(epochs=1, **SMALL).fit(manifest, 'tiny', resume=(folder := tmp_path_factory.mktemp('stopped')))
    return folder

def test_other_settings_are_not_mixed_in(manifest, stopped):
    before = (stopped/'training.pt').read_bytes()
    with pytest.raises(DeepfidError, match='lr=0.0015, not 0.002'): DeepFidelity(epochs=1, lr=2e-3, **SMALL).fit(manifest, 'tiny', resume=stopped)
    assert (stopped/'training.pt').read_bytes()==before

def test_other_faces_are_not_mixed_in(manifest, stopped):
    fewer = manifest.where(pair=list(dict.fromkeys(manifest.table['pair']))[3:])
    with pytest.raises(DeepfidError, match='faces='): DeepFidelity(epochs=1, **SMALL).fit(fewer, 'tiny', resume=stopped)

def test_corrupt_training_state_is_refused(manifest, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path/'t')
    (tmp_path/'t'/'training.pt').write_bytes(b'nothing')
    with pytest.raises(DeepfidError, match='not a checkpoint'): DeepFidelity(epochs=1, **SMALL).fit(manifest, 'tiny', resume=tmp_path/'t')

def test_none_is_a_setting():
    assert DeepFidelity(ema=None, clip=None).resolve_config('tiny').ema is None

def test_loaded_detector_is_retrained_with_its_own_settings(trained, tmp_path):
    trained.save(tmp_path/'d')
    again = DeepFidelity.load(tmp_path/'d')
    import json
    assert json.loads(json.dumps(again.resolve_config('tiny', 'ours').to_dict()))==json.loads(json.dumps(trained.config.to_dict()))

def test_scores_that_do_not_rise_have_no_threshold_to_believe(manifest):
    with pytest.warns(UserWarning, match='do not rise'): d = DeepFidelity(epochs=1, bands=((.45, .49), (.51, .55)), svr=dict(epsilon=.3), **SMALL).fit(manifest, 'tiny')
    assert d.calibration==(0., 0.) and np.isfinite(d.threshold)

# -- step two again --
@pytest.mark.parametrize('bands', ['x', 5, ((0, .4), (.6,)), ((0, 'a'), (.6, 1)), ((0, .4), (.6, 2))])
def test_bands_that_are_none_are_refused_before_training(bands):
    with pytest.raises(DeepfidError, match='^bands: '): DeepFidelity(bands=bands).configure('tiny')

def test_refit_shares_the_network_and_leaves_the_first_alone(manifest, trained):
    before = scores(trained, manifest)
    other = trained.refit(manifest, mapping='rank', bands=((0., .2), (.8, 1.)))
    assert other.model is trained.model and other.config.mapping=='rank' and trained.config.mapping=='minmax'
    np.testing.assert_array_equal(scores(trained, manifest), before)
    assert np.abs(scores(other, manifest)-before).max()>1e-3

def test_refit_with_another_regressor(manifest, trained, tmp_path):
    other = trained.refit(manifest, Ridge())
    assert np.isfinite(scores(other, manifest)).all()
    with pytest.raises(DeepfidError, match='Ridge has no form without pickle'): other.save(tmp_path/'d')
    assert not (tmp_path/'d').exists()

def test_refit_with_another_measure(manifest, trained):
    class Brightness:
        def score(self, images): return np.array([im.mean() for im in images])
    other = trained.refit(manifest, measure=Brightness())
    assert not np.allclose(other.mapping.knots_['real'][0], trained.mapping.knots_['real'][0])

def test_refit_with_another_measure_of_what_learned_fidelities(manifest, tmp_path):
    class Brightness:
        def score(self, images): return np.array([im.mean() for im in images])
    d = DeepFidelity(epochs=1, target='fidelity', **SMALL).fit(manifest, 'tiny')
    output = torch.tensor([[.9], [.2]])
    assert d.fake_logit(output)[1]>d.fake_logit(output)[0] # the second is more of a fake
    other = d.refit(manifest, measure=Brightness())
    assert other.measured_rates=={} and not np.allclose(other.mapping.knots_['real'][0], d.mapping.knots_['real'][0])

def test_the_folder_of_the_weights_is_nobodys_business(manifest, trained, tmp_path):
    trained.save(tmp_path/'private'/'d')
    again = DeepFidelity.load(trained.save(tmp_path/'d'))
    again.config.weights = str(tmp_path/'private'/'d'/'network.safetensors')
    assert json.loads((again.save(tmp_path/'e')/'detector.json').read_text())['config']['weights']=='network.safetensors'

def test_refit_refuses_what_needs_another_training(manifest, trained):
    with pytest.raises(DeepfidError, match="'lr'"): trained.refit(manifest, lr=1e-4)
    with pytest.raises(DeepfidError, match='needs targets'): trained.refit(manifest, Ridge(), mapping=None)

def test_refits_do_not_share_a_regressor(manifest, trained):
    ridge = Ridge()
    a, b = trained.refit(manifest, ridge), trained.refit(manifest, ridge, bands=((0., .1), (.9, 1.)))
    assert a.regressor is not b.regressor and not hasattr(ridge, 'coef_')

@pytest.mark.parametrize('measure', ['niqe', 'serfiq'])
def test_measures_by_name(tmp_path, measure):
    m = write_pairs(tmp_path, 18)
    d = DeepFidelity(epochs=1, size=64, bs=4, quality=measure).fit(m, 'tiny')
    assert d.config.quality==measure and np.isfinite(scores(d, m)).all()

def test_each_forger_fills_the_band_for_itself(manifest, trained, tmp_path):
    t = manifest.table.copy()
    half = t.index[t['label']==0][::2]
    t.loc[half, 'method'] = 'worse'
    t.loc[half, 'quality'] -= 100. # one forger's images are far worse
    worse = Manifest(t, manifest.folder)
    def spread(d):
        train, targets = worse.of('train').table, d.fit_targets(worse)
        return {m: (round(float(targets[(train['method']==m).to_numpy()].min()), 6), round(float(targets[(train['method']==m).to_numpy()].max()), 6)) for m in set(train['method'])-{'real'}}
    together, apart = spread(trained.refit(worse)), spread(trained.refit(worse, by_forger=True))
    assert set(apart.values())=={(0., .4)} and len(set(together.values()))>1
    with pytest.raises(DeepfidError, match='goes with a mapping'): DeepFidelity(by_forger=True, mapping=None).configure('tiny')
    with pytest.raises(DeepfidError, match='True or False'): DeepFidelity(by_forger=1).configure('tiny')

def test_the_regressor_for_many_rows_is_kept(manifest, trained, tmp_path):
    from deepfid.export import detector_graph
    from deepfid.models.deepfidelity.regressor import ApproxRegressor
    many = trained.refit(manifest, ApproxRegressor(components=20, random_state=0))
    again = DeepFidelity.load(many.save(tmp_path/'many'))
    assert isinstance(again.regressor, ApproxRegressor)
    np.testing.assert_allclose(scores(again, manifest), scores(many, manifest), atol=1e-6)
    with pytest.raises(DeepfidError, match='Ridge has no graph'): detector_graph(trained.refit(manifest, Ridge()))

# -- several processes --
def test_parts_of_a_batch_are_the_batch(manifest):
    make = lambda: FaceLoader(FaceDataset(manifest.of('train'), 'label', 64), 16, shuffle=True, drop_last=True, flip=False, shift=0)
    whole = list(make())
    parts = [list(make().shard(k, 2)) for k in range(2)]
    for (x, y), *halves in zip(whole, *parts): assert torch.equal(x, torch.cat([h[0] for h in halves])) and torch.equal(y, torch.cat([h[1] for h in halves]))
    with pytest.raises(DeepfidError, match='multiple of 10'): make().shard(0, 5)

def test_two_processes_train_one_network(manifest, tmp_path):
    pytest.importorskip('accelerate')
    manifest.save()
    script = tmp_path/'train.py'
    script.write_text(textwrap.dedent(f'''
        import os, numpy as np, torch
        torch.set_num_threads(1)
        from fastai.callback.core import Callback
        from deepfid.data.manifest import Manifest
        from deepfid.models.deepfidelity.detector import DeepFidelity
        m = Manifest.read({str(manifest.folder/'manifest.csv')!r})
        class Within(Callback): # the learner's own context must not undo ours
            def before_fit(self): self.learn.distrib_ctx().__enter__()
        d = DeepFidelity(epochs=2, size=64, bs=20, ema=.8, device='cpu').fit(m, 'tiny', cbs=[Within()])
        test = m.of('test')
        np.save({str(tmp_path)!r}+f"/scores{{os.environ['RANK']}}.npy", [p.fidelity for p in d.predict([test.image(i) for i in range(len(test))])])
    '''))
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', '29533', str(script)], capture_output=True, text=True,
        timeout=300, env=dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', ACCELERATE_USE_CPU='true'))
    assert run.returncode==0, run.stderr[-2000:]
    a, b = (np.load(tmp_path/f'scores{k}.npy') for k in range(2))
    np.testing.assert_allclose(a, b, atol=1e-4) # averaged gradients: the processes hold one network

# -- refused before any time is spent --
@pytest.mark.parametrize('asked, says', [(dict(svr=dict(C=-1)), 'C=-1'), (dict(svr=dict(D=1)), "'D'"), (dict(network=dict(wings=2)), 'wings'), (dict(schedule='random'), 'one-cycle'),
    (dict(arch='resnet'), 'ssaaformer_tiny'), (dict(ssaa_blocks=99), 'from 0 up to 4'), (dict(epochs=0), 'from 1'), (dict(weights='/nowhere.pth'), 'no such file'), (dict(augment='strong'), 'imagenet'),
    (dict(crop=0), 'crop=0'), (dict(crop=2), 'crop=2'), (dict(smoothing=3), 'smoothing=3'), (dict(smoothing=float('nan')), 'smoothing=nan'), (dict(bands=((0, .2), (.3, .45))), 'one side of 0.5'), (dict(bands=((.55, .6), (.7, 1))), 'one side of 0.5')])
def test_settings_are_checked_first(manifest, monkeypatch, asked, says):
    monkeypatch.setattr(DeepFidelity, 'train_phase', lambda self, learn, phase: pytest.fail('training began'))
    with pytest.raises(DeepfidError, match=says) as e: DeepFidelity(**SMALL|asked).fit(manifest, 'tiny')
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('keep, recipe, says', [(lambda t: (t.label==1)|(t.split!='train'), 'ours', "'train' has only real"), (lambda t: (t.label==0)|(t.split!='valid'), 'ours', "'valid' has only fake"),
    (lambda t: t.split!='valid', 'ours', "'valid' has no faces"), (lambda t: t.split!='test', 'released', "'test' has no faces")])
def test_one_class_is_refused_first(manifest, monkeypatch, keep, recipe, says):
    monkeypatch.setattr(DeepFidelity, 'train_phase', lambda self, learn, phase: pytest.fail('training began'))
    t = manifest.table
    with pytest.raises(ManifestError, match=says): DeepFidelity(**SMALL).fit(Manifest(t[keep(t)].reset_index(drop=True), manifest.folder), 'tiny', recipe)

def test_resuming_into_a_file_is_refused(manifest, tmp_path):
    (tmp_path/'f').write_text('x')
    with pytest.raises(DeepfidError, match='is a file'): DeepFidelity(epochs=1, **SMALL).fit(manifest, 'tiny', resume=tmp_path/'f')
    assert (tmp_path/'f').read_text()=='x'

# -- the axis of the face is that of the mirror --
@pytest.mark.parametrize('size', [64, 96, 112, 128, 160, 224])
def test_face_and_mirror_have_one_axis_in_new_detectors_and_pairs(size):
    from deepfid.data.faces import alignment_template
    from deepfid.data.pairs import PairStyle
    align, margin = DeepFidelity(size=size).configure('tiny').crop_rule
    assert align==PairStyle(size).align=='symmetric'
    def off(template): # of eyes, nose and mouth from the axis of a flipped image
        return np.abs(np.array([template[:2].mean(0), template[2], template[3:].mean(0)])[:, 0]-(size-1)/2).max()
    assert off(alignment_template(size, margin, align))<.05<off(alignment_template(size, margin, 'similarity'))

def test_detectors_saved_before_keep_their_crop_and_pairs_say_theirs(tmp_path):
    from deepfid.data.pairs import build_pairs, map_images, synthetic_sources
    from deepfid.models.local_similarity.detector import LocalSimilarity
    saved = DeepFidelity().configure('tiny').config.to_dict()
    assert DeepFidelity.load_config(saved).crop_align=='symmetric'
    assert DeepFidelity.load_config({k: v for k, v in saved.items() if k!='crop_align'}).crop_align=='similarity'
    for align in ('symmetric', 'similarity'):
        m = build_pairs(synthetic_sources(12, 1), tmp_path/align, ('mouth',), (2, 1, 1), 64, workers=1, align=align)
        for faces in (m, map_images(m, lambda im: im, tmp_path/f'{align}-copy')):
            for kind in (DeepFidelity, LocalSimilarity):
                detector = kind().configure('tiny')
                detector.adopt_crop_rule(faces)
                assert detector.crop_rule==(align, 1.3)

def test_sizes_that_a_stride_cuts_are_refused():
    for size, settings in ((114, {}), (116, dict(ssaa_blocks=3))):
        with pytest.raises(DeepfidError, match=f'size={size}: SSAA mirrors maps of stride [48]') as e: DeepFidelity(size=size, **settings).configure('tiny')
        assert '\n' not in str(e.value)
    for size, settings in ((116, {}), (114, dict(ssaa_blocks=0)), (120, dict(ssaa_blocks=3))):
        assert DeepFidelity(size=size, **settings).resolve_config('tiny').size==size

# -- the regression is chosen on validation faces --
def test_settings_of_the_regression_are_chosen_on_validation_faces(manifest, trained, tmp_path):
    from deepfid.models.deepfidelity.detector import SVR_CANDIDATES
    assert [t['svr'] for t in trained.svr_tried]==list(SVR_CANDIDATES) and SVR_CANDIDATES[0]=={}
    tried = [t['valid_auc'] for t in trained.svr_tried]
    best = SVR_CANDIDATES[int(np.argmax(tried))]
    assert all(getattr(trained.regressor, k)==v for k, v in best.items()) and trained.regressor.scale==best.get('scale', False)
    valid = manifest.of('valid')
    assert auc(trained.score(valid), valid.table['label'].to_numpy())==pytest.approx(max(tried))
    for settings, value in zip(SVR_CANDIDATES, tried): # each as if it had been asked for
        other = trained.refit(manifest, svr=settings)
        assert other.svr_tried==[] and auc(other.score(valid), valid.table['label'].to_numpy())==pytest.approx(value, abs=1e-6)
    assert DeepFidelity.load(trained.save(tmp_path/'d')).svr_tried==trained.svr_tried
