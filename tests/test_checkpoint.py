"Checkpoints of other people: read without running code, and refused with their differences"
import argparse
from pathlib import Path
import numpy as np, pytest, torch
from safetensors.torch import save_file
from deepfid.core import WeightsError
from deepfid.models.base import weight_differences
from deepfid.models.deepfidelity.checkpoint import load_checkpoint, read_weights
from deepfid.models.deepfidelity.ssaaformer import SSAAFormer

NET = dict(depths=(1,1,1,1), dims=(16,16,32,32), head_dim=16)
class RunsCode:
    "Writes a file when it is unpickled"
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.write_text, (self.path, 'run')

def test_heads_of_another_width_and_values_that_are_none(tmp_path):
    net = SSAAFormer(**NET)
    torch.save(dict(arch='uniformer_small', state_dict=net.state_dict()), tmp_path/'small.pth')
    with pytest.raises(WeightsError, match='heads of 32 channels.*have 16'): load_checkpoint(net, tmp_path/'small.pth')
    for bad, message in ((torch.tensor(torch.nan).expand(32), 'NaN'), (torch.ones(32, dtype=torch.int32), 'whole numbers')):
        torch.save(net.state_dict()|{'norm.weight': bad}, tmp_path/'v.pth')
        with pytest.raises(WeightsError, match=f'norm.weight holds {message}'): load_checkpoint(net, tmp_path/'v.pth')

def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save(dict(state_dict=RunsCode(tmp_path/'run')), tmp_path/'bad.pth')
    with pytest.raises(WeightsError, match='could run code') as e: load_checkpoint(SSAAFormer(**NET), tmp_path/'bad.pth')
    assert not (tmp_path/'run').exists() and '\n' not in str(e.value)

def test_released_form_is_read_and_averaged_weights_are_used(tmp_path):
    a, b, net = (SSAAFormer(**NET, aux_head=True) for _ in range(3))
    torch.save(dict(epoch=1, arch='x', state_dict=a.state_dict(), state_dict_ema=b.state_dict(), optimizer={}, args=argparse.Namespace(lr=1.)), tmp_path/'c.pth.tar')
    load_checkpoint(net, tmp_path/'c.pth.tar')
    assert all(torch.equal(p, q) for p, q in zip(net.state_dict().values(), b.state_dict().values()))

def test_another_network_is_refused_with_its_differences(tmp_path):
    net, other = SSAAFormer(**NET), SSAAFormer((1,1,1,1), (16,16,32,64), 16)
    save_file(other.state_dict(), tmp_path/'o.safetensors')
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(WeightsError, match=r'patch_embed4.proj.weight has shape .*and \d+ more') as e: load_checkpoint(net, tmp_path/'o.safetensors')
    assert '\n' not in str(e.value) and all(torch.equal(before[k], v) for k, v in net.state_dict().items())

def test_missing_and_extra_keys_are_named(tmp_path):
    net = SSAAFormer(**NET)
    weights = net.state_dict()
    weights['blocks9.w'] = weights.pop('norm.weight')
    save_file(weights, tmp_path/'o.safetensors')
    with pytest.raises(WeightsError, match='norm.weight is missing; blocks9.w is not part'): load_checkpoint(net, tmp_path/'o.safetensors')
    assert weight_differences(net.state_dict(), net.state_dict())==[]

@pytest.mark.parametrize('content, message', [(b'', 'cannot be read'), (b'rubbish', 'cannot be read'), (None, 'no such file')])
@pytest.mark.parametrize('ending', ['.pth', '.safetensors'])
def test_unreadable_weights(tmp_path, content, message, ending):
    path = tmp_path/f'w{ending}'
    if content is not None: path.write_bytes(content)
    with pytest.raises(WeightsError, match=message): read_weights(path)

@pytest.mark.parametrize('held', [{0: torch.zeros(1)}, {'state_dict': None}, {'state_dict': torch.zeros(3)}, {'norm.weight': 3}])
def test_dicts_that_are_no_weights(tmp_path, held):
    torch.save(held, tmp_path/'d.pth')
    with pytest.raises(WeightsError) as e: load_checkpoint(SSAAFormer(**NET), tmp_path/'d.pth')
    assert '\n' not in str(e.value)

def test_heads_of_other_classes_are_an_error_unless_left_out(tmp_path):
    torch.save(SSAAFormer(**NET, num_classes=9).state_dict(), tmp_path/'n.pth')
    with pytest.raises(WeightsError, match='head.weight is missing'): load_checkpoint(SSAAFormer(**NET), tmp_path/'n.pth')
    load_checkpoint(SSAAFormer(**NET), tmp_path/'n.pth', heads=False)

def test_a_list_is_no_set_of_weights(tmp_path):
    torch.save([1, 2], tmp_path/'l.pth')
    with pytest.raises(WeightsError, match='holds a list'): read_weights(tmp_path/'l.pth')

def test_numbers_of_numpy_and_a_missing_average_beside_the_weights_do_no_harm(tmp_path):
    a, net = SSAAFormer(**NET), SSAAFormer(**NET)
    torch.save(dict(state_dict=a.state_dict(), state_dict_ema=None, metric=np.float64(.9), epoch=np.int64(3)), tmp_path/'n.pth')
    load_checkpoint(net, tmp_path/'n.pth')
    assert all(torch.equal(p, q) for p, q in zip(net.state_dict().values(), a.state_dict().values()))
