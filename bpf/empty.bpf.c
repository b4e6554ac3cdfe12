// SPDX-License-Identifier: (Apache-2.0 OR GPL-2.0)
/* A tc program that does nothing, to which `make bench` compares the marker. */

#include <linux/bpf.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_helpers.h>

SEC("tc")
int empty(struct __sk_buff *skb)
{
	return TC_ACT_UNSPEC;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
