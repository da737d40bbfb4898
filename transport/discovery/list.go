package discovery

import (
	"context"
	"encoding/json"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/internal/plain"
)

// Registered is what stands in etcd at one key.
type Registered struct {
	Node

	Metadata map[string]string // what of it is text, each as one line of 128 bytes at most
}

// List reads what is registered below a prefix, most entries at most, in the order of their keys. Values that cannot be read
// are left out.
func List(ctx context.Context, client *clientv3.Client, prefix string, most int) ([]Registered, error) {
	reply, err := client.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithLimit(int64(most)))
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", prefix, err)
	}
	var all []Registered
	for _, kv := range reply.Kvs {
		if !ofNode(prefix, string(kv.Key)) {
			continue
		}
		n, err := parseNode(string(kv.Key), kv.Value, nil)
		if err != nil {
			continue
		}
		all = append(all, Registered{n, metadataTexts(kv.Value)})
	}
	return all, nil
}

func metadataTexts(value []byte) map[string]string {
	var in struct{ Metadata map[string]json.RawMessage }
	if json.Unmarshal(value, &in) != nil {
		return nil // it is somebody else's
	}
	texts := make(map[string]string, len(in.Metadata))
	for key, raw := range in.Metadata {
		var text string
		if json.Unmarshal(raw, &text) == nil {
			texts[plain.Line(key, textMax)] = plain.Line(text, textMax)
		}
	}
	return texts
}
