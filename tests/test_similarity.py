"The pairwise similarity matrix: its two forms, its target, what a single kernel cannot do; the mask decoder"
import math
import pytest, torch
from torch.nn import functional as F
from deepfid.core import DeepfidError
from deepfid.models.backbones import xception
from deepfid.models.local_similarity.decoder import CLAFFM, DECODER_LEVELS, MaskDecoder, SimilarityNet, similarity_losses, total_loss
from deepfid.models.local_similarity.llsm import LLSM, cosine_logits, pair_target
from deepfid.testing import peak_memory

# -- two forms of one matrix --
@pytest.mark.parametrize('kw', [dict(), dict(hidden=0), dict(hidden=1), dict(hidden=5), dict(chunk=1), dict(chunk=9), dict(chunk=1000)])
@pytest.mark.parametrize('shape', [(2,12,4,4), (1,12,3,7)])
def test_factored_equals_pairs(kw, shape):
    torch.manual_seed(0)
    llsm, x = LLSM(12, **kw), torch.randn(shape)
    torch.testing.assert_close(llsm(x), llsm.forward_pairs(x), atol=1e-5, rtol=1e-5)

def test_full_size_map_is_equal_too():
    torch.manual_seed(0)
    llsm, x = LLSM(728), torch.randn(1, 728, 14, 14)
    with torch.inference_mode(): assert (llsm(x)-llsm.forward_pairs(x)).abs().max()<1e-5

@pytest.mark.parametrize('chunk', [None, 3])
def test_gradients_are_equal(chunk):
    torch.manual_seed(0)
    llsm, x = LLSM(6, hidden=7, chunk=chunk), torch.randn(2, 6, 4, 4, requires_grad=True)
    grads = [torch.autograd.grad(f(x).pow(2).sum(), [x, *llsm.parameters()]) for f in (llsm, llsm.forward_pairs)]
    for a, b in zip(*grads): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

def test_row_is_the_first_position_and_column_the_second():
    llsm = LLSM(2, hidden=0)
    with torch.no_grad():
        llsm.pair.weight.zero_(); llsm.pair.bias.zero_()
        llsm.pair.weight[0,0,0,0], llsm.pair.weight[0,1,1,0] = 1., 10.
    x = torch.arange(12.).view(1, 2, 2, 3)
    f = x.flatten(2)[0]
    assert torch.equal(llsm(x)[0], f[0][:,None]+10*f[1][None])

def test_cosine():
    x = torch.randn(1, 8, 2, 3)
    f = x.flatten(2)[0].T
    want = -F.cosine_similarity(f[:,None], f[None], dim=-1)
    torch.testing.assert_close(cosine_logits(x)[0], want)
    assert LLSM(8, metric='cosine')(x).shape==(1, 6, 6)

def test_less_memory_in_training_with_chunks():
    x = torch.randn(1, 16, 24, 24, requires_grad=True)
    small, whole = (peak_memory(lambda c=c: LLSM(16, chunk=c)(x).sum()) for c in (16, 576))
    assert small<whole/4

# -- the target --
def test_target_of_halves():
    m = torch.zeros(1, 8, 8)
    m[:,:,4:] = 1
    t = pair_target(m, 2)[0]
    assert torch.equal(t, torch.tensor([[0.,1,0,1],[1,0,1,0],[0,1,0,1],[1,0,1,0]]))

@pytest.mark.parametrize('first', [False, True])
def test_target_is_symmetric_with_an_empty_diagonal(first):
    t = pair_target(torch.rand(3, 1, 30, 30).round(), (4, 5), first)
    assert torch.equal(t, t.transpose(1, 2)) and not t.diagonal(dim1=1, dim2=2).any() and set(t.unique().tolist())<={0., 1.}

def test_real_faces_have_an_empty_map(): assert not pair_target(torch.zeros(2, 64, 64), 8).any()

def test_border_positions_differ_from_none_unless_binarised_first():
    m = torch.zeros(1, 4, 6)
    m[:,:,3:] = 1                                   # columns of positions: 0, half, 1
    assert pair_target(m, (1, 3))[0].tolist()==[[0,0,1],[0,0,0],[1,0,0]]
    m[:,0,2] = 1                                    # the middle one is more forged than not
    assert pair_target(m, (1, 3), binarise_first=True)[0].tolist()==[[0,1,1],[1,0,0],[1,0,0]]

# -- the single kernel --
def logits_of_kinds(u): return torch.stack([u[2], u[1]+u[2], u[0]+u[2], u[0]+u[1]+u[2]])

@pytest.mark.parametrize('p, lowest', [(.5, math.log(2)), (.3, .5293), (.1, .1167)])
def test_no_sum_can_do_better(p, lowest):
    w, y = torch.tensor([(1-p)**2, p*(1-p), p*(1-p), p*p]), torch.tensor([0.,1,1,0])
    torch.manual_seed(0)
    for _ in range(200):
        u = torch.randn(3)*torch.tensor(4.)
        assert (w*F.binary_cross_entropy_with_logits(logits_of_kinds(u), y, reduction='none')).sum()>=lowest-1e-3

def trained(hidden, steps=150):
    torch.manual_seed(0)
    llsm, trace = LLSM(8, hidden), torch.randn(8)
    opt = torch.optim.Adam(llsm.parameters(), 2e-2)
    for _ in range(steps):
        mask = torch.rand(8, 36).argsort(1)<18
        x = (.4*torch.randn(8, 8, 36)+mask[:,None]*trace[None,:,None]).view(8, 8, 6, 6)
        loss = F.binary_cross_entropy_with_logits(llsm(x), (mask[:,:,None]!=mask[:,None]).float())
        opt.zero_grad(); loss.backward(); opt.step()
    return loss.item()

def test_single_kernel_stays_at_chance_and_sixteen_do_not(): assert trained(0)>.68 and trained(16)<.4

# -- refused --
@pytest.mark.parametrize('make, message', [(lambda: LLSM(4, metric='angle'), 'cosine'), (lambda: LLSM(4, hidden=-1), 'hidden=-1'), (lambda: LLSM(4, chunk=-1), 'chunk=-1'), (lambda: LLSM(4, hidden=2.5), 'hidden=2.5')])
def test_refused(make, message):
    with pytest.raises(DeepfidError, match=message): make()

def test_symmetric_in_both_forms():
    llsm, x = LLSM(6, symmetric=True), torch.randn(2, 6, 3, 4)
    assert torch.allclose(llsm(x), llsm.forward_pairs(x), atol=1e-5)

# -- the decoder --
@pytest.mark.parametrize('size, sides', [(299, (19, 37, 74, 147, 299)), (224, (14, 28, 55, 109, 224)), (128, (8, 16, 31, 61, 128))])
def test_levels_of_the_decoder(size, sides):
    net = xception('tiny').eval()
    decoder = MaskDecoder(net.channels, .25).eval()
    with torch.no_grad(): mask, levels = decoder(net(torch.zeros(1, 3, size, size), [s for s, _ in DECODER_LEVELS if s]+['act4']), (size, size))
    assert mask.shape==(1, 1, size, size) and tuple(l.shape[2] for l in levels)==sides and [l.shape[1] for l in levels]==[64, 32, 16, 8, 8]

def test_full_widths_of_the_decoder():
    with torch.device('meta'):
        net = xception('full')
        mask, levels = MaskDecoder(net.channels)(net(torch.zeros(2, 3, 224, 224), [s for s, _ in DECODER_LEVELS if s]+['act4']), (224, 224))
    assert [l.shape[1] for l in levels]==[256, 128, 64, 32, 32]

def test_a_gate_weighs_channels_by_the_coarser_map():
    gate, a = CLAFFM(6, 5).eval(), torch.randn(2, 5, 9, 7)
    with torch.no_grad():
        w, other = gate(a, torch.randn(2, 6, 3, 3))/a, gate(a, torch.randn(2, 6, 3, 3))/a
    assert torch.allclose(w, w[:, :, :1, :1].expand_as(w), atol=1e-4) and 0<w.min() and w.max()<1 and not torch.allclose(w, other, atol=1e-4)

def test_masks_of_another_size_or_batch_are_refused_by_torch():
    net, x, label = SimilarityNet('tiny').eval(), torch.zeros(2, 3, 64, 64), torch.tensor([1, 0])
    with torch.no_grad(): out = net(x)
    for shape in ((2, 1, 32, 32), (3, 1, 64, 64), (0, 1, 64, 64)):
        with pytest.raises(ValueError, match='same as input size'): similarity_losses(out, label, torch.zeros(shape))
    similarity_losses(out, label, torch.zeros(2, 1, 64, 64))

def test_losses_do_not_wait_for_the_device(monkeypatch):
    "No value of a tensor is read on the way: each such read would stop a GPU at every step"
    out, mask = SimilarityNet('tiny').eval()(torch.zeros(2, 3, 64, 64)), torch.zeros(2, 1, 64, 64)
    def read(tensor, *args): raise AssertionError('a tensor is read')
    for name in ('__bool__', 'item', 'tolist', '__float__', '__int__'): monkeypatch.setattr(torch.Tensor, name, read)
    total_loss(similarity_losses(out, torch.tensor([1, 0]), mask)).backward()

# -- on other backbones --
def test_xception_keeps_its_parameters_wherever_the_classifier_reads():
    def names(**kw): return {k: tuple(v.shape) for k, v in SimilarityNet('tiny', **kw).state_dict().items()}
    published, moved, both = names(), names(cls_from='encoder'), names(cls_from='both')
    assert set(published)==set(moved)==set(both) and not [k for k in published if k.startswith('encoder_head')]
    assert [n['head.weight'] for n in (published, moved, both)]==[(1, 8), (1, 512), (1, 520)]
    with pytest.raises(DeepfidError, match="cls_from='head'"): SimilarityNet('tiny', cls_from='head')

@pytest.mark.parametrize('cls_from, features', [('encoder', 1280), ('decoder', 8), ('both', 1288)])
def test_lite0_has_every_output(cls_from, features):
    net, x = SimilarityNet(backbone='efficientnet_lite0', cls_from=cls_from).eval(), torch.randn(2, 3, 160, 160)
    with torch.no_grad(): out = net(x)
    assert out.logit.shape==(2,) and out.mask.shape==(2, 1, 160, 160) and out.similarity_logits.shape==(2, 100, 100) and out.map_size==(10, 10)
    assert net.embed(x).shape==(2, features) and 2*sum(p.numel() for p in net.parameters())<12e6
    assert [g.gate[1].weight.shape[:2] for g in net.decoder.gates]==[(32, 64), (16, 32), (8, 16)]

def test_plain_lite0_is_timms_network_up_to_the_classifier(timm):
    whole, net = timm.create_model('tf_efficientnet_lite0', num_classes=0).eval(), SimilarityNet(backbone='efficientnet_lite0', use_llsm=False, use_flm=False).eval()
    for part in (net.backbone, net.encoder_head): part.load_state_dict({k: v for k, v in whole.state_dict().items() if k in part.state_dict()})
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(net.embed(x), whole(x), atol=1e-5, rtol=1e-5)
        out = net(x)
    torch.testing.assert_close(out.logit, net.head(whole(x))[:, 0].detach(), atol=1e-5, rtol=1e-5)
    assert out.mask is out.similarity_logits is None
    assert set(net.state_dict())=={f'backbone.{k}' for k in net.backbone.state_dict()}|{f'encoder_head.{k}' for k in net.encoder_head.state_dict()}|{'head.weight', 'head.bias'}

@pytest.mark.parametrize('name, tap, levels', [('xception_tiny', 16, 4), ('ssaaformer_tiny', 16, 3), ('resnet18', 16, 4)])
def test_any_backbone_with_stage_maps(name, tap, levels):
    net = SimilarityNet(backbone=name, cls_from='encoder').eval()
    with torch.no_grad(): out = net(torch.randn(1, 3, 64, 64))
    assert net.tap==tap and len(net.decoder.levels)==levels and out.mask.shape==(1, 1, 64, 64) and out.map_size==(4, 4)

def test_classifier_at_the_encoder_does_not_pass_the_decoder():
    net = SimilarityNet(backbone='efficientnet_lite0', cls_from='encoder')
    similarity_losses(net(torch.randn(2, 3, 64, 64)), torch.tensor([1, 0]))['cls'].backward()
    assert all(p.grad is None for p in net.decoder.parameters()) and net.backbone.conv_stem.weight.grad.abs().sum()>0
