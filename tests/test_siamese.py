"LiSiam's network: every shape, one pass against two, the losses of every ablation, attention that doesn't overflow, degraded batches, timm's backbones"
import numpy as np, pytest, torch
from torch import nn
from torch.nn import functional as F
from deepfid.core import DeepfidError
from deepfid.data import degrade as stills
from deepfid.io import read_safetensors, save_safetensors
from deepfid.models.backbones import create_backbone, efficientnet_lite0_weights, xception
from deepfid.models.lisiam import degradation as batches
from deepfid.models.lisiam.degradation import DegradeBatch, shuffle_patches, patch_permutation
from deepfid.models.lisiam.detector import LiSiam, one_cycle_decay, polynomial_decay
from deepfid.models.lisiam.network import LISIAM_ABLATIONS, IGNORE_INDEX, FULL_METHOD_TERMS, LiSiamNet, LiSiamOutput, dilated_backbone, invariance_loss, segmentation_loss, feature_map_size, siamese_losses
from deepfid.models.lisiam.ocr import gather_regions
from deepfid.models.lisiam.training import SiameseLoss
from deepfid.models.lisiam.transformer import (SCU_KINDS, MaskGuidedTransformer, SqueezeExcite, attention_weights, separable_conv_unit,
    split_by_mask)
from deepfid.testing import tiny_manifest

def n_weights(m): return sum(p.numel() for p in m.parameters())
def still(net): # no dropout, stored statistics, gradients
    return net.eval().requires_grad_(True)

@pytest.fixture(scope='module')
def full(): return LiSiamNet('full').eval()

@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return LiSiamNet('tiny')

@pytest.fixture
def batch():
    "Two real and two forged noise images of the tiny size, degraded copies, labels, masks"
    torch.manual_seed(1)
    x = torch.rand(4, 3, 128, 128)*2-1
    mask = torch.zeros(4, 1, 128, 128)
    mask[2:, :, 30:70, 40:100] = 1
    return x, F.avg_pool2d(x, 3, 1, 1), torch.tensor([1, 1, 0, 0]), mask

def shapes(net, x):
    "Shape of the output of every named part"
    found, hooks = {}, []
    def look(name): return lambda m, i, o: found.update({name: tuple((o[0] if isinstance(o, tuple) else o).shape[1:])})
    for name, m in net.named_modules():
        if name not in ('', 'backbone'): hooks.append(m.register_forward_hook(look(name)))
    with torch.inference_mode(): out = net(x)
    for h in hooks: h.remove()
    return found, out

# -- shapes of the paper --
EXPECT = {'backbone.block1': (128, 74), 'backbone.block2': (256, 37), 'backbone.block3': (728, 37), 'backbone.block4': (728, 37), 'backbone.block11': (728, 37),
    'backbone.block12': (1024, 37), 'ocr.bottleneck': (512, 37), 'ocr.aux': (2, 37), 'ocr.attention': (512, 37), 'ocr': (512, 37), 'decoder': (2, 37), 'scu': (512, 13), 'mt': (1024, 13)}
TINY = {'backbone.block2': (64, 16), 'backbone.block3': (184, 16), 'backbone.block12': (256, 16), 'ocr': (128, 16), 'decoder': (2, 16), 'scu': (128, 7), 'mt': (256, 7)}

def test_shapes_at_299(full):
    found, out = shapes(full, torch.zeros(1, 3, 299, 299))
    for name, (c, n) in EXPECT.items(): assert found[name]==(c, n, n), name
    assert found['ocr.attention.query']==(256, 37, 37) and found['ocr.attention.key']==(256, 2, 1)==found['ocr.attention.value']
    assert found['mt.query']==(512, 13, 13) and found['mlp']==(1024,)
    assert [tuple(t.shape) for t in out]==[(1, 2), (1, 2, 37, 37), (1, 2, 37, 37), (1, 1024)]

def test_shapes_of_tiny(tiny):
    found, out = shapes(tiny.eval(), torch.zeros(2, 3, 128, 128))
    for name, (c, n) in TINY.items(): assert found[name]==(c, n, n), name
    assert [tuple(t.shape) for t in out]==[(2, 2), (2, 2, 16, 16), (2, 2, 16, 16), (2, 256)]

@pytest.mark.parametrize('n', [64, 112, 128, 131, 149, 224, 256, 299])
def test_side_of_the_maps(n, tiny):
    with torch.inference_mode(): assert tiny.eval()(torch.zeros(1, 3, n, n)).seg.shape==(1, 2, feature_map_size(n), feature_map_size(n))

@pytest.mark.parametrize('kind, sides', [('separable', [19, 21, 11, 13]), ('dense', [19, 21, 11, 13]), ('stride3', [13, 13])])
def test_unit_shrinks_37_to_13(kind, sides):
    x, found = torch.randn(1, 8, 37, 37), []
    for layer in separable_conv_unit(kind, 8).eval():
        x = layer(x)
        if isinstance(layer, nn.Conv2d): found.append(x.shape[-1])
    assert found==sides and x.shape==(1, 8, 13, 13)

@pytest.mark.parametrize('kw, millions', [(dict(scu='dense'), 36.99), (dict(scu='stride3'), 32.02), (dict(ocr_fuse=1), 28.09)])
def test_parameter_counts(kw, millions):
    with torch.device('meta'): assert n_weights(LiSiamNet('full', **kw))/1e6==pytest.approx(millions, abs=.01)

def test_a_padded_unit_has_a_constant_ring():
    torch.manual_seed(0)
    for kind in SCU_KINDS:
        y = separable_conv_unit(kind, 4).eval()(torch.randn(3, 4, 37, 37))
        ring = torch.ones(y.shape[2:], dtype=torch.bool)
        ring[1:-1, 1:-1] = False
        assert (y[:, :, ring].std(0).max()<1e-6)==(not kind.startswith('stride')) and y[:, :, ~ring].std(0).min()>0

def test_imagenet_names_fit():
    import timm
    have = timm.create_model('legacy_xception').state_dict()
    want = LiSiamNet('full').backbone.state_dict()
    assert all(k in have and have[k].shape==v.shape for k, v in want.items())

# -- OCR --
def test_regions_are_weighted_means():
    x, logits = torch.randn(2, 5, 4, 3), torch.randn(2, 2, 4, 3)
    r, w = gather_regions(x, logits), logits[1, 0].exp()/logits[1, 0].exp().sum()
    assert r.shape==(2, 5, 2, 1)
    torch.testing.assert_close(r[1, :, 0, 0], (x[1]*w).sum((1, 2)))
    sure = torch.full((1, 2, 4, 3), -1e4)
    sure[0, 0, 1, 2] = sure[0, 1, 3, 0] = 0
    torch.testing.assert_close(gather_regions(x[:1], sure)[0, :, :, 0], torch.stack([x[0, :, 1, 2], x[0, :, 3, 0]], 1))

# -- mask-guided transformer --

def test_equations_position_by_position():
    "Against eq. 9 to 13 written with loops"
    torch.manual_seed(0)
    mt, f, r = MaskGuidedTransformer(3, drop=0.).eval(), torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2)
    y, w = mt.transform(f, r)
    fs, rs = f.flatten(2)[0].T, r.flatten(2)[0].T
    m = lambda layer: layer.weight[:, :, 0, 0]
    for i in range(4):
        a = torch.stack([(m(mt.query)@fs[i])@(m(mt.key)@rs[j]) for j in range(4)]).softmax(0)
        torch.testing.assert_close(w[0, i], a)
        mixed = sum(a[j]*(m(mt.value)@rs[j]) for j in range(4))
        torch.testing.assert_close(y.flatten(2)[0, :, i], mt.merge(mixed[None, :, None, None])[0, :, 0, 0])

def test_attention_is_unscaled_and_rows_sum_to_one():
    q, k = torch.randn(2, 64, 5), torch.randn(2, 64, 7)
    w = attention_weights(q, k)
    torch.testing.assert_close(w.sum(2), torch.ones(2, 5))
    torch.testing.assert_close(w.log()[0, 0]-w.log()[0, 0, 0], q[0, :, 0]@k[0]-q[0, :, 0]@k[0, :, 0])

def large_values():
    "A transformer and parts whose query times key leaves fp16, and differs by less than bf16 can tell"
    torch.manual_seed(0)
    mt = MaskGuidedTransformer(512, drop=0.).eval()
    for m in (mt.query, mt.key): nn.init.eye_(m.weight.data[:, :, 0, 0])
    with torch.no_grad(): mt.query.weight.mul_(0).view(512, 512).fill_diagonal_(1); mt.key.weight.mul_(0).view(512, 512).fill_diagonal_(1)
    forged = torch.full((1, 512, 4, 4), 16.)
    real = torch.full((1, 512, 4, 4), 16.)
    real[:, 0].view(-1)[:] = 16+torch.arange(16)/64.
    return mt, forged, real

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_attention_stays_in_float32(dtype):
    mt, forged, real = large_values()
    want, exact = mt.transform(forged, real)
    def naive(): return attention_weights(mt.query(forged).flatten(2), mt.key(real).flatten(2))
    with torch.autocast('cpu', dtype):
        got, kept = mt.transform(forged.to(dtype), real.to(dtype).float() if dtype==torch.float16 else real)
        unsafe = naive().float()
    assert want.isfinite().all() and kept.dtype==torch.float32 and got.isfinite().all()
    torch.testing.assert_close(kept, exact)
    assert not unsafe.isfinite().all() or (unsafe-exact).abs().max()>.1 # what the test would catch

def test_whole_network_under_autocast(tiny, batch):
    x, degraded, label, mask = batch
    with torch.autocast('cpu', torch.bfloat16): parts = siamese_losses(*tiny.siamese(x, degraded), label, mask)
    assert all(v.dtype==torch.float32 and v.isfinite() for v in parts.values())

def test_squeeze_excite_weighs_channels():
    x = torch.randn(2, 32, 3, 3)
    w = SqueezeExcite(32)(x)/x
    torch.testing.assert_close(w, w[:, :, :1, :1].expand_as(w), atol=1e-5, rtol=1e-4)
    assert 0<w.min() and w.max()<1

def test_map_learns_through_the_transformer(tiny, batch):
    "No detach: the class loss alone moves the decoder"
    tiny.siamese(*batch[:2], ('cls1',))[0].logits.sum().backward()
    assert tiny.decoder.weight.grad.abs().sum()>0

# -- one pass and two --
def test_one_pass_is_two_passes_where_statistics_are_stored(tiny, batch):
    net, (x, degraded, label, mask) = still(tiny), batch
    one = siamese_losses(*net.siamese(x, degraded), label, mask)
    grads = torch.autograd.grad(one['total'], [*net.parameters()])
    two = siamese_losses(net(x), net(degraded), label, mask)
    for k in one: torch.testing.assert_close(one[k], two[k])
    for a, b in zip(grads, torch.autograd.grad(two['total'], [*net.parameters()])): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)

def test_only_what_the_losses_need(tiny, batch, monkeypatch):
    seen = []
    monkeypatch.setattr(tiny, 'locate', lambda x: (seen.append(len(x)), type(tiny).locate(tiny, x))[1])
    found = {t: tiny.siamese(*batch[:2], terms=t) for t in (FULL_METHOD_TERMS, ('cls1',), ('seg1', 'li'), LISIAM_ABLATIONS['E']['terms'], LISIAM_ABLATIONS['B']['terms'])}
    assert seen==[8, 4, 8, 4, 8]
    classified = [tuple(o is not None and o.logits is not None for o in out) for out in found.values()]
    assert classified==[(True, False), (True, False), (False, False), (False, True), (True, True)]
    assert [tuple(o is not None for o in out) for out in found.values()]==[(True, True), (True, False), (True, True), (False, True), (True, True)]

def test_inference_is_the_clean_branch(tiny, batch):
    net = tiny.eval()
    with torch.inference_mode(): a, b = net(batch[0]), net.siamese(batch[0], batch[1])[0]
    for u, v in zip(a, b): torch.testing.assert_close(u, v)
    torch.testing.assert_close(a.fidelity, a.logits.softmax(1)[:, 0])

# -- losses --
def test_map_loss_is_cross_entropy():
    seg, mask = torch.randn(2, 2, 16, 16), (torch.rand(2, 1, 128, 128)>.5).float()
    mask[:, :, :9] = IGNORE_INDEX
    up = F.interpolate(seg, (128, 128), mode='bilinear', align_corners=False)
    torch.testing.assert_close(segmentation_loss(seg, mask), F.cross_entropy(up, mask[:, 0].long(), ignore_index=IGNORE_INDEX))
    small = F.interpolate(mask, (16, 16), mode='nearest-exact')[:, 0].long()
    torch.testing.assert_close(segmentation_loss(seg, mask, 'feature'), F.cross_entropy(seg, small, ignore_index=IGNORE_INDEX))

def test_padding_teaches_nothing():
    seg = torch.randn(1, 2, 16, 16, requires_grad=True)
    mask = torch.full((1, 1, 128, 128), float(IGNORE_INDEX))
    mask[..., :64] = 0
    segmentation_loss(seg, mask, 'feature').backward()
    assert seg.grad[..., 8:].abs().max()==0 and seg.grad[..., :8].abs().min()>0
    assert segmentation_loss(seg, torch.full_like(mask, IGNORE_INDEX))==0

def test_invariance():
    a, b = torch.randn(2, 2, 4, 4, requires_grad=True), torch.randn(2, 2, 4, 4, requires_grad=True)
    torch.testing.assert_close(invariance_loss(a, b), (a-b).abs().mean())
    invariance_loss(a, b).backward()
    assert a.grad.abs().min()>0 and torch.equal(a.grad, -b.grad)
    assert invariance_loss(a, a)==0==invariance_loss(a, a+3, 'prob').round(decimals=5) and invariance_loss(a, a+3).item()==pytest.approx(3)
    assert invariance_loss(1e3*a, -1e3*a, 'prob')<=1

def test_identical_images_agree_in_eval(tiny, batch):
    with torch.inference_mode():
        assert siamese_losses(*tiny.eval().siamese(batch[0], batch[0]), *batch[2:])['li']<1e-5

def test_column_0_is_real(tiny, batch):
    out = LiSiamOutput(torch.tensor([[9., -9.], [-9., 9.]]), None, torch.zeros(2, 2, 16, 16), None)
    assert siamese_losses(out, None, torch.tensor([1, 0]), None, ('cls1',))['total']<1e-6
    assert out.fidelity.round().tolist()==[1, 0]
    seg = torch.zeros(1, 2, 16, 16)
    seg[:, 1], mask = 9, torch.ones(1, 1, 128, 128)
    assert segmentation_loss(seg, mask)<1e-3

LISTED = dict(A={'cls1', 'seg1', 'aux1', 'li'}, B={'cls1', 'cls2', 'seg1', 'seg2', 'aux1', 'li'}, C={'cls1', 'li'}, D={'cls2', 'seg2', 'aux2', 'li'}, E={'cls2', 'seg2', 'aux2'},
    F={'cls1', 'seg1', 'aux1', 'li'}, G={'cls1', 'seg1', 'aux1'})

@pytest.mark.parametrize('name', LISIAM_ABLATIONS)
def test_ablations_have_exactly_their_losses(name, batch):
    torch.manual_seed(0)
    a, (x, degraded, label, mask) = LISIAM_ABLATIONS[name], batch
    net = LiSiamNet('tiny', mt=a['mt'])
    parts = siamese_losses(*net.siamese(x, degraded, a['terms']), label, mask, a['terms'])
    assert set(parts)==LISTED[name]|{'total'} and (net.mt is None)==(name=='F')
    torch.testing.assert_close(parts['total'], sum(v*(.4 if k.startswith('aux') else 1) for k, v in parts.items() if k!='total'))
    parts['total'].backward()
    net.eval()(x)                                             # all are tested on the clean branch

def test_strict_paper_has_no_auxiliary_loss(tiny, batch):
    parts = siamese_losses(*tiny.siamese(*batch[:2]), *batch[2:], w_aux=0.)
    torch.testing.assert_close(parts['total'], parts['cls1']+parts['seg1']+parts['li'])

def test_without_decoder(batch):
    net = LiSiamNet('tiny', mt=False, seg=False)
    assert net(batch[0]).seg is None and net.siamese(*batch[:2], ('cls1', 'cls2'))[1].seg is None

# -- refused --
@pytest.mark.parametrize('change, message', [
    (dict(li_on='probability'), "'logits', 'prob'"), (dict(seg_loss_at='output'), "'input', 'feature'")])
def test_losses_refuse(tiny, batch, change, message):
    x, degraded, label, mask = batch
    with torch.no_grad(): out = tiny.eval().siamese(x, degraded)
    with pytest.raises(DeepfidError, match=message) as e: siamese_losses(*out, **dict(label=label, mask=mask)|change)
    assert '\n' not in str(e.value)

def test_unknown_losses_and_other_batches_are_refused(tiny, batch):
    x, degraded, label, mask = batch
    with pytest.raises(DeepfidError, match="'cls3'"): tiny.siamese(x, degraded, ('cls3',))
    with pytest.raises(DeepfidError, match="'cls3'"): SiameseLoss(('cls3',))
    with torch.no_grad(): out = tiny.eval().siamese(x, degraded)
    for wrong in (mask[:3], mask.expand(-1, 3, -1, -1)):
        with pytest.raises(ValueError, match='same as input size'): siamese_losses(*out, label, wrong)

def test_losses_do_not_wait_for_the_device(tiny, batch, monkeypatch):
    "No value of a tensor is read on the way: each such read would stop a GPU at every step"
    x, degraded, label, mask = batch
    out = tiny.eval().siamese(x, degraded)
    def read(tensor, *args): raise AssertionError('a tensor is read')
    for name in ('__bool__', 'item', 'tolist', '__float__', '__int__'): monkeypatch.setattr(torch.Tensor, name, read)
    siamese_losses(*out, label, mask)['total'].backward()

@pytest.mark.parametrize('make, message', [(lambda: LiSiamNet('huge'), "'huge'"), (lambda: LiSiamNet('tiny', scu='paper'), "'separable', 'dense', 'stride3'"), (lambda: LiSiamNet('tiny', ocr_fuse=2), 'ocr_fuse=2'),
    (lambda: LiSiamNet('tiny', seg=False), 'guided by the segmentation')])
def test_network_refuses(make, message):
    with pytest.raises(DeepfidError, match=message): make()

# -- degraded batches --
def image_of(size=96, seed=0):
    "Texture at all scales, uint8 (H,W,3)"
    import cv2
    rng = np.random.default_rng(seed)
    x = sum(cv2.resize(rng.normal(0, 20, (n, n, 3)), (size, size), interpolation=cv2.INTER_CUBIC) for n in (4, 12, 40))
    return np.clip(x+(170, 110, 60), 0, 255).astype(np.uint8)

def planes(image): return torch.from_numpy(image).permute(2, 0, 1).float()
def normalised(*images): return torch.stack([planes(i) for i in images])/127.5-1
X = normalised(image_of(seed=0), image_of(seed=1), image_of(seed=2), image_of(seed=3))

@pytest.mark.parametrize('sigma', [0, .1, .3, .7, 1., 3.])
def test_blur_is_opencvs(sigma): assert (batches.tensor_blur(planes(image_of()), sigma).round()-planes(stills.blur(image_of(), sigma))).abs().max()<=1

@pytest.mark.parametrize('down', ['nearest', 'bilinear'])
@pytest.mark.parametrize('up', ['nearest', 'bilinear'])
@pytest.mark.parametrize('fraction', [1/3, .5])
def test_resize_is_opencvs(down, up, fraction):
    want = stills.apply_steps(image_of(), [('resize', dict(fraction=fraction, down=down, up=up))])
    assert (batches.tensor_resize(planes(image_of()), fraction, down, up).round()-planes(want)).abs().max()<=2

@pytest.mark.parametrize('size', [96, 101, 112, 16, 7])
@pytest.mark.parametrize('quality', [1, 10, 35, 49, 50, 75, 95, 100])
def test_jpeg_is_nearly_libjpegs(quality, size):
    image = image_of(size)
    want, got = planes(stills.jpeg(image, quality)), batches.tensor_jpeg(planes(image), quality)
    assert got.shape==want.shape and (got-want).abs().mean()<.12*(want-planes(image)).abs().mean()+.35

def test_exact_is_libjpegs(): assert torch.equal(batches.tensor_libjpeg(planes(image_of()), 30), planes(stills.jpeg(image_of(), 30)))

@pytest.mark.parametrize('jpeg, close', [('exact', .1), ('torch', .8)])
def test_batch_is_what_stills_do(jpeg, close):
    d, one = DegradeBatch(seed=3, p=1, order=('jpeg', 'blur'), jpeg=jpeg), stills.Degrade(seed=3, p=1, order=('jpeg', 'blur'))
    got = d(X)
    assert got.shape==X.shape and got.dtype==X.dtype
    for i in range(4): assert ((got[i]+1)*127.5-planes(one(image_of(seed=i)))).abs().mean()<close

def test_probability_zero_changes_nothing():
    x = X+1e-4*torch.randn_like(X)
    before, out = x.clone(), DegradeBatch(p=0)(x)
    assert torch.equal(out, before) and torch.equal(x, before) and out.data_ptr()!=x.data_ptr()

def test_input_is_kept_and_each_image_has_its_own_recipe():
    x, d = X.clone(), DegradeBatch(seed=1)
    out = d(x)
    assert torch.equal(x, X) and len({str(s) for s in d.last_recipes})>1
    assert ((out+1)*127.5-((out+1)*127.5).round()).abs().max()<1e-3 and out.abs().max()<=1

def test_order_and_formats():
    d = DegradeBatch(p=1, order=('blur', 'jpeg'), seed=0)
    assert d(X.to(torch.bfloat16)).dtype==torch.bfloat16 and all([op for op, _ in s]==['blur', 'jpeg'] for s in d.last_recipes)
    assert d(X.to(memory_format=torch.channels_last)).shape==X.shape

def test_geometry_is_shared():
    "Flipping and cropping first, as the loader does, then degrading: a landmark stays where it was in both branches and the mask"
    x = torch.full((1, 3, 96, 96), -1.)
    x[:, :, 20:45, 50:75] = 1
    mask = (x[:, :1]>0).float()
    clean, degraded, after = DegradeBatch(p=1, seed=0).make_branches(x.flip(3), mask.flip(3))
    assert torch.equal(clean, x.flip(3)) and torch.equal(after, mask.flip(3))
    at = lambda m: [((m*g).sum()/m.sum()).item() for g in torch.meshgrid(torch.arange(96.), torch.arange(96.), indexing='ij')]
    assert at((degraded[0].mean(0)+1).clamp(min=.3)-.3)==pytest.approx(at(after[0, 0]), abs=1.5) # mirrored, it would be 29 pixels off

def test_nearest_quirk_never_downsamples_smoothly():
    d = DegradeBatch(p=1, order=('resize',), seed=0, released_quirks=('nearest',))
    out = d(X)
    for i, [(_, s)] in enumerate(d.last_recipes): torch.testing.assert_close((out[i]+1)*127.5, batches.tensor_resize(((X[i]+1)*127.5).round(), s['fraction'], 'nearest', 'bilinear').round().clamp(0, 255), atol=1e-3, rtol=0)

@pytest.mark.parametrize('jpeg', ['exact', 'torch'])
def test_bgr_quirk_takes_red_for_blue(jpeg):
    kw = dict(p=1, quality=(20, 20), order=('jpeg',), jpeg=jpeg)
    out, right = DegradeBatch(**kw, released_quirks=('bgr',))(X), DegradeBatch(**kw)(X)
    assert torch.equal(out, DegradeBatch(**kw)(X.flip(1)).flip(1)) and (out-right).abs().mean()>.005

def test_unpermuted_patches_are_the_image_without_its_border():
    x = torch.arange(100.).view(1, 10, 10).repeat_interleave(10, 1).repeat_interleave(10, 2)
    x = F.pad(x[None], (3,)*4, mode='replicate')[0]
    order = np.arange(100).reshape(10, 10)
    torch.testing.assert_close(shuffle_patches(x, order, 'nearest-exact')[0, 8::10, 8::10], torch.arange(100.).view(10, 10)[:10, :10])
    swapped = order.copy(); swapped[0, :2] = 1, 0
    assert shuffle_patches(x, swapped, 'nearest-exact')[0, 8, [8, 18]].tolist()==[1, 0]

def test_shuffle_quirk_moves_image_and_mask_alike():
    rng = np.random.default_rng(0)
    source = patch_permutation(10, rng)
    assert sorted(source.ravel())==list(range(100)) and not np.array_equal(source, np.arange(100).reshape(10, 10))
    x = X.clone()
    clean, degraded, mask = DegradeBatch(p=0, seed=0, released_quirks=('shuffle',)).make_branches(x, x[:, :1])
    moved = [(clean[i]-x[i]).abs().mean()>.01 for i in range(4)]
    assert any(moved) and not all(moved) and torch.equal(clean, degraded) and torch.equal(x, X)
    for i in range(4): assert (mask[i]-clean[i, :1]).abs().mean()<.15

@pytest.mark.parametrize('call, message', [(lambda: DegradeBatch(p=2), 'p=2'), (lambda: DegradeBatch(quality=(0, 50)), 'quality'), (lambda: DegradeBatch(sigma=(1, .1)), 'sigma'), (lambda: DegradeBatch(side=(100, 400)), 'side'),
    (lambda: DegradeBatch(order=('noise',)), "'noise'"), (lambda: DegradeBatch(released_quirks=('rgb',)), "'nearest', 'bgr', 'shuffle'"), (lambda: DegradeBatch(jpeg='turbo'), "'exact', 'torch'"),
    (lambda: DegradeBatch()(torch.zeros(2, 1, 9, 9)), 'batch of images'), (lambda: DegradeBatch()(torch.zeros(3, 9, 9)), 'batch'), (lambda: DegradeBatch()(torch.zeros(2, 3, 9, 9, dtype=torch.uint8)), 'uint8')])
def test_degradation_refuses(call, message):
    with pytest.raises(DeepfidError, match=message) as e: call()
    assert '\n' not in str(e.value)

# -- dilation, and backbones of timm --
@pytest.mark.parametrize('destride', [('block3',), ('block12',), ('block3', 'block12')])
@pytest.mark.parametrize('n', [96, 131])
def test_dilated_maps_hold_the_strided_ones(n, destride):
    "At the positions that the strided network has, a de-strided and dilated one computes the same: its weights go on meaning the same"
    torch.manual_seed(0)
    x, strided = torch.randn(2, 3, n, n), xception('tiny', pretrained=True).eval()
    dilated, undilated = (xception('tiny', pretrained=True, destride=destride, dilate=d).eval() for d in (True, False))
    with torch.no_grad(): want, got, plain = (net(x, net.stages) for net in (strided, dilated, undilated))
    for stage, step in strided.reductions().items():
        k = step//dilated.reductions()[stage]
        assert got[stage].shape==plain[stage].shape
        torch.testing.assert_close(got[stage][..., ::k, ::k], want[stage], atol=1e-5, rtol=1e-5)
    k = strided.reductions()['block12']//dilated.reductions()['block12']
    assert (plain['block12'][..., ::k, ::k]-want['block12']).abs().mean()>.1*want['block12'].abs().mean() # what the dilation is for

def test_undilated_xception_is_as_published():
    nets = [xception('tiny', destride=('block3', 'block12')), xception('tiny', destride=('block3', 'block12'), dilate=True)]
    assert [*nets[0].state_dict()]==[*nets[1].state_dict()]
    published, dilated = ({m.dilation for m in net.modules() if isinstance(m, nn.Conv2d)} for net in nets)
    assert published=={(1, 1)} and dilated=={(1, 1), (2, 2), (4, 4)}
    assert not any(isinstance(m, nn.ConstantPad2d) for m in nets[0].modules())

@pytest.fixture
def lite():
    torch.manual_seed(0)
    return LiSiamNet('tiny', scu='stride1', backbone='efficientnet_lite0')

@pytest.mark.parametrize('n', [96, 160, 224])
def test_dilated_timm_network_holds_the_strided_maps(n):
    x = torch.randn(2, 3, n, n)
    dilated, strided = dilated_backbone('efficientnet_lite0', True).eval(), create_backbone('efficientnet_lite0', True).eval()
    with torch.no_grad(): got, want = dilated(x), strided(x)
    assert [m.shape[-1] for m in got]==[n//16]*2
    torch.testing.assert_close(got[0], want[-2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[1][..., 1::2, 1::2], want[-1], atol=1e-4, rtol=1e-4) # 'same' padding of TensorFlow: odd positions

def test_shapes_with_a_timm_backbone(lite):
    found, out = shapes(lite.eval(), torch.zeros(2, 3, 160, 160))
    assert [found[k] for k in ('ocr', 'decoder', 'scu', 'mt')]==[(128, 10, 10), (2, 10, 10), (128, 10, 10), (256, 10, 10)]
    assert out.seg.shape==out.aux.shape==(2, 2, 10, 10) and out.features.shape==(2, 256)
    assert 2*sum(v.numel() for v in lite.state_dict().values())<12e6 # bytes in half precision

def test_stride_1_keeps_every_position_in_register():
    unit, hot = separable_conv_unit('stride1', 4).eval(), torch.zeros(1, 4, 10, 10)
    nn.init.ones_(unit[0].weight)
    with torch.no_grad():
        base = unit(hot)
        for i in (0, 3, 9):
            hot.zero_()[..., i, i] = 1
            moved = (unit(hot)-base).abs().sum((0, 1)).nonzero()
            assert moved.min().item()==max(0, i-1) and moved.max().item()==min(9, i+1)
        noise = unit(torch.randn(9, 4, 10, 10)).std(0)
    assert noise.min()>1e-3

def patches(corners, seed, side=16, n=64):
    "Noise with a coarser patch in each image, at its upper left corner; and the masks"
    g = torch.Generator().manual_seed(seed)
    x, mask = .2*torch.randn(len(corners), 3, n, n, generator=g), torch.zeros(len(corners), 1, n, n)
    for i, (top, left) in enumerate(corners):
        coarse = torch.randn(1, side//2, side//2, generator=g).repeat_interleave(2, 1).repeat_interleave(2, 2)
        x[i, :, top:top+side, left:left+side] += .8*coarse
        mask[i, :, top:top+side, left:left+side] = 1
    return x, mask

def centre_offset(w, corners, n=64, side=16):
    "Mean distance (down, right) of the centres of maps (B,h,w) from those of the patches, pixels"
    w = (w-w.flatten(1).quantile(.6, 1)[:, None, None]).clamp(min=0)
    c = (torch.arange(w.shape[-1])+.5)*n/w.shape[-1]-.5
    at = torch.stack([(w.sum(2)*c).sum(1), (w.sum(1)*c).sum(1)], 1)/w.sum((1, 2))[:, None]
    return (at-torch.tensor(corners).float()-(side-1)/2).mean(0)

@torch.no_grad()
def test_a_moved_patch_lights_up_its_own_position():
    "A decoder that is fitted to patches finds moved ones where they are, in the segmentation and where the transformer reads it"
    torch.manual_seed(0)
    net = LiSiamNet('tiny', scu=LiSiam(size=64).resolve_config('tiny').scu, dilate=True)
    x, mask = patches(np.random.default_rng(0).integers(0, 49, (160, 2)).tolist(), 0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = 1.
    net.train().locate(x) # its statistics
    features = net.eval().locate(x)[0]
    a = features.permute(0, 2, 3, 1).flatten(0, 2)
    a, y = F.pad(a, (0, 1), value=1.), 8*F.adaptive_avg_pool2d(mask, features.shape[-1]).flatten()-4
    w = torch.linalg.solve(a.T@a+1e-3*len(a)*a.var()*torch.eye(a.shape[1]), a.T@y)
    net.decoder.weight.zero_(); net.decoder.bias.zero_()
    net.decoder.weight[1, :, 0, 0], net.decoder.bias[1] = w[:-1], w[-1]
    corners = [(t, l) for t in (12, 20, 28, 36) for l in (12, 20, 28, 36)]
    features, seg, _ = net.locate(patches(corners, 9)[0])
    _, read = split_by_mask(torch.ones_like(net.scu(features)[:, :1]), seg) # where the classifier's features are
    half_a_cell = 64/seg.shape[-1]/2
    for found in (seg.softmax(1)[:, 1], read[:, 0]):
        assert centre_offset(found, corners).abs().max()<half_a_cell
        for axis in (1, 2): assert centre_offset(found.roll(1, axis), corners).abs().max()>half_a_cell # a cell off is noticed

def test_small_maps_have_no_ring_and_pretrained_ones_are_dilated():
    def c(preset='tiny', recipe=None, **settings): return LiSiam(**settings).resolve_config(preset, recipe)
    assert [c(size=n).scu for n in (112, 128, 160)]==['stride1', 'stride1', 'separable'] # 14, 16 and 20 positions a side
    assert c('full').scu==c('full', 'ours').scu=='separable' and c('full', 'released').scu=='dense'
    lite0 = lambda n: LiSiam(backbone='efficientnet_lite0', size=n).resolve_config('full', 'ours').scu
    assert [lite0(n) for n in (160, 224, 299, 320)]==['stride1']*3+['separable'] # 10, 14, 19 and 20
    assert c().dilate and c('full').dilate and c(recipe='paper').dilate and not c(recipe='paper', pretrained=False).dilate
    assert c(recipe='paper', pretrained=False, weights='x.safetensors').dilate and not c('full', 'released').dilate

def test_rescale_quirk_is_shared_by_image_and_mask_and_pads_with_nothing():
    x = torch.stack([torch.linspace(-1, 1, 64).expand(3, 64, 64)]*8)
    mask = (x[:, :1]>0).float()
    clean, degraded, moved = DegradeBatch(p=0, seed=0, released_quirks=('rescale',)).make_branches(x, mask)
    assert torch.equal(clean, degraded) and clean.shape==x.shape and moved.shape==mask.shape
    padded = moved==IGNORE_INDEX
    widths = (~padded).float().mean((1, 2, 3))**.5
    assert widths.min()<.99 and widths.max()==1 and widths.min()>=.8-1/64
    assert (clean.expand_as(x)[padded.expand_as(x)]==0).all()
    inside = ~padded&(clean[:, :1].abs()>.05)
    assert ((clean[:, :1]>0)==(moved==1))[inside].all() # the mask moved with the image
    assert torch.isfinite(segmentation_loss(torch.randn(8, 2, 8, 8), moved))
    assert 'rescale' in LiSiam().resolve_config('full', 'released').released_quirks

def test_every_branch_of_a_timm_backbone_learns(lite, batch):
    siamese_losses(*lite.siamese(*batch[:2]), *batch[2:])['total'].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lite.parameters())

@pytest.mark.parametrize('name, message', [('vit_tiny_patch16_224', 'output_stride'), ('ssaaformer_tiny', 'output_stride'), ('lite1', "no backbone 'lite1'")])
def test_backbones_without_an_output_stride_are_refused(name, message):
    with pytest.raises(DeepfidError, match=message) as e: LiSiamNet('tiny', backbone=name)
    assert '\n' not in str(e.value)

# -- the detector on such a backbone --
@pytest.fixture(scope='module')
def faces(): return tiny_manifest((12, 6, 6), 64)

FAST = dict(size=64, bs=4, steps=2, epochs=(1, 1, 1))

@pytest.fixture(scope='module')
def finetuned(faces, tmp_path_factory):
    state = tmp_path_factory.mktemp('state')
    return LiSiam(backbone='efficientnet_lite0', **FAST).fit(faces, preset='tiny', recipe='finetune', resume=state/'s'), state/'s'

def test_finetuning(finetuned, faces):
    d, state = finetuned
    assert d.config.recipe=='finetune' and d.config.scu=='stride1' and {h['phase'] for h in d.history}=={1, 2, 3}
    assert [p.name for p in sorted(state.iterdir()) if p.is_dir()]==['phase-1', 'phase-2', 'phase-3']
    again = LiSiam(backbone='efficientnet_lite0', **FAST).fit(faces, preset='tiny', recipe='finetune', resume=state) # nothing is left to do
    for a, b in zip(d.model.state_dict().values(), again.model.state_dict().values()): torch.testing.assert_close(a, b)

def test_finetuned_saved_is_loaded(finetuned, faces, tmp_path):
    d, images = finetuned[0], [faces.of('test').image(i) for i in range(6)]
    want = d.predict(images)
    assert all(p.mask.shape==(64, 64) and 0<=p.mask.min()<=p.mask.max()<=1 for p in want)
    for half, close in ((False, 1e-6), (True, 2e-2)):
        again = LiSiam.load(d.save(tmp_path/f'{half}', half))
        assert again.config.backbone=='efficientnet_lite0'
        for p, q in zip(want, again.predict(images)):
            assert abs(p.fidelity-q.fidelity)<=close and np.abs(p.mask-q.mask).max()<=5*close
    assert (tmp_path/'True'/'network.safetensors').stat().st_size<12e6
    with torch.no_grad(): assert d.inference_model().eval()(torch.zeros(1, 3, 64, 64)).seg.shape==(1, 2, 4, 4)

@pytest.mark.parametrize('format', ['torch', 'onnx'])
def test_finetuned_is_exported(finetuned, faces, format, tmp_path):
    if format=='onnx': [pytest.importorskip(m) for m in ('onnx', 'onnxscript', 'onnxruntime')]
    from deepfid.export import export_graph
    d, images = finetuned[0], [faces.of('test').image(i) for i in range(3)]
    path, x, want = export_graph(d, tmp_path/'g', format), next(iter(d.batches(images))), d.predict(images)
    if format=='torch':
        with torch.inference_mode(): score, mask = (o.numpy() for o in torch.export.load(path).module()(x))
    else:
        import onnxruntime
        score, mask = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider']).run(None, dict(image=x.numpy()))
    assert np.abs(score-[p.fidelity for p in want]).max()<1e-4 and np.abs(mask-np.stack([p.mask for p in want])).max()<1e-4

def test_finetuned_is_explained(finetuned, faces):
    from deepfid.explain import detector_grad_cam
    d = finetuned[0]
    cam = detector_grad_cam(d, [faces.image(0)], d.explain_layer, d.fake_logit)
    assert np.asarray(cam).shape==(1, 4, 4) and np.isfinite(cam).all() # at every position of the segmentation

def test_weights_to_start_from(tmp_path):
    import timm
    torch.manual_seed(1)
    net = timm.create_model('tf_efficientnet_lite0', num_classes=1)
    save_safetensors(tmp_path/'w.safetensors', net.state_dict())
    start = LiSiam(weights=tmp_path/'w.safetensors', **FAST).configure('tiny', 'finetune')
    torch.testing.assert_close(start.model.backbone.state_dict()['blocks.6.0.conv_pw.weight'], net.blocks[6][0].conv_pw.weight.detach())
    again = LiSiam.load(start.save(tmp_path/'d'))
    (tmp_path/'w.safetensors').unlink()
    again, x = LiSiam.load(tmp_path/'d'), torch.randn(2, 3, 64, 64) # the file is not needed any more, and its folder not told
    with torch.no_grad(): torch.testing.assert_close(again.model.eval()(x).logits, start.model.eval()(x).logits)
    assert again.config.weights=='w.safetensors'

def test_wrong_weights_are_refused(tmp_path):
    save_safetensors(tmp_path/'w.safetensors', xception('tiny').state_dict())
    (tmp_path/'text.safetensors').write_text('no weights')
    for path in (tmp_path/'w.safetensors', tmp_path/'text.safetensors', tmp_path/'none.safetensors'):
        with pytest.raises(DeepfidError, match=path.name) as e: LiSiam(weights=path, **FAST).configure('tiny', 'finetune')
        assert '\n' not in str(e.value)
    torch.testing.assert_close(LiSiam(weights=tmp_path/'w.safetensors', backbone='xception').configure('tiny', 'ours').model.backbone.conv1.weight,
        read_safetensors(tmp_path/'w.safetensors')['conv1.weight'])

def test_imagenet_is_the_start_of_finetuning():
    d = LiSiam(**FAST).configure('tiny', 'finetune')
    torch.testing.assert_close(d.model.backbone.conv_stem.weight.detach(), efficientnet_lite0_weights()['conv_stem.weight'])

def test_detectors_saved_before_dilation_have_none():
    saved = LiSiam().configure('tiny').config.to_dict()
    assert saved['dilate'] and LiSiam.load_config(saved).dilate
    assert not LiSiam.load_config({k: v for k, v in saved.items() if k!='dilate'}).dilate

# -- learning rate --
def test_warm_up():
    plain, warm = polynomial_decay(.002), polynomial_decay(.002, warmup=.2)
    assert [plain(0.), warm(.2)]==pytest.approx([.002, .002]) and warm(0.)==pytest.approx(2e-5)==warm(1.)
    rates = [warm(t) for t in np.linspace(0, .2, 9)]
    assert rates==sorted(rates) and max(warm(t) for t in np.linspace(0, 1, 101))<=.002+1e-12
    assert [warm(.2+.8*t) for t in (.1, .5, .9)]==pytest.approx([plain(t) for t in (.1, .5, .9)])
    cycle = one_cycle_decay(1e-3, .25)
    assert [cycle(0.), cycle(.25), cycle(1.)]==pytest.approx([4e-5, 1e-3, 1e-8])
    assert one_cycle_decay(1e-3, 0.)(0.)==pytest.approx(1e-3)

@pytest.mark.parametrize('change, message', [(dict(warmup=1), 'warmup'), (dict(schedule='cosine'), "'polynomial', 'one-cycle'"), (dict(dilate='yes'), 'dilate')])
def test_settings_of_finetuning_are_checked(change, message):
    with pytest.raises(DeepfidError, match=message): LiSiam(**change).configure('tiny', 'finetune')

@pytest.mark.cuda
def test_on_the_gpu():
    d = DegradeBatch(p=1, seed=0, jpeg='torch')
    a, b = d(X.cuda()), DegradeBatch(p=1, seed=0, jpeg='torch')(X)
    assert a.is_cuda and (a.cpu()-b).abs().mean()<.01
    net = LiSiamNet('tiny').cuda()
    with torch.autocast('cuda', torch.float16): out = net.siamese(a, a)
    assert out[0].logits.isfinite().all()
