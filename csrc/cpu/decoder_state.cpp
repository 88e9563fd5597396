#include "decoder_pass.h"

namespace amq {

void DecoderPass::apply(const Step&, const DeltaNet&) {}
void DecoderPass::apply(const Step&, const ShortConv&) {}

}  // namespace amq
