/* SPDX-License-Identifier: Apache-2.0 */
/* What marker.bpf.c, src/sys/mark_maps.rs and src/sys/marker.rs know. Any change of key or value needs a new version in
 * the path of the pinned maps (PIN_DIR in src/sys/mark_maps.rs). */
#pragma once

#include <linux/types.h>

/* A flow as its packets leave this host. Ports in network byte order. */
struct flow_key {
	__u8 source[16];
	__u8 destination[16];
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 zero[3];
};

/* What its packets get, and how many got it. */
struct flow_mark {
	__u32 label;	/* 20 bits, host byte order */
	__u32 tag;	/* experiment << 8 | activity: the 24 bits of the option */
	__u64 packets;	/* as they go over the wire: a GSO packet counts as its segments */
	__u64 bytes;	/* of frames, as the kernel counts them: GSO headers once */
};

/* Set before loading, so that the verifier removes what is not used. */
struct settings {
	__u32 hop_by_hop;	/* add a Hop-by-Hop Options header */
	__u32 destination;	/* add a Destination Options header */
	__u32 match_all;	/* every IPv6 packet is marked by the entry of the all-zero key */
	__u32 check_mtu;	/* the kernel has bpf_check_mtu (5.12) */
	__u32 debug;		/* write to the trace pipe */
	__u32 pad;
	__u64 entropy_key;	/* of match_all, where labels are made here */
};

/* Why a packet of a known flow went out unmarked: an index of the map `unmarked`. */
enum unmarked {
	UNMARKED_MTU,		/* it would be larger than the MTU */
	UNMARKED_HEADERS,	/* fragment, jumbogram, or a Hop-by-Hop header is there already */
	UNMARKED_REFUSED,	/* the kernel does not make room: UDP GSO, inline VLAN */
	UNMARKED_REASONS,
};
