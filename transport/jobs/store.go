package jobs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	pubsub "github.com/push-manager/push-manager/proto"
)

// Errors of a Service. An *engine.InvalidError says what is wrong with a request.
var (
	ErrUnknown     = errors.New("there is no such job")
	ErrExists      = errors.New("the job_id has another spec")
	ErrEnded       = errors.New("the job has ended")
	ErrNotEnded    = errors.New("the job has not ended, or its last answers are not there yet")
	ErrFull        = errors.New("too many jobs are kept")
	ErrFullTenant  = errors.New("too many jobs of the tenant are kept: delete some that have ended")
	ErrUnavailable = errors.New("etcd does not answer")
)

// errConflict says that somebody else has written the record.
var errConflict = errors.New("the record has changed")

// key names a job.
type key struct{ tenant, id string }

// stored is a record as it stands in etcd.
type stored struct {
	record

	rev   int64     // when it was written
	since time.Time // since when it is known so, in the table
}

// store is the jobs in etcd. Below its prefix there are
//
//	spec/<tenant>/<id>   the BroadcastJobSpec, written once
//	state/<tenant>/<id>  the record
//	owner/<tenant>/<id>  the name of the instance that runs it, with a lease
//
// where a tenant that there is not is "-", which is no tenant's name.
type store struct {
	client  *clientv3.Client
	prefix  string
	timeout time.Duration
}

func (s *store) request(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, s.timeout)
}

func (s *store) path(kind string, k key) string { return s.below(kind, k.tenant) + k.id }

func (s *store) below(kind, tenant string) string {
	if tenant == "" {
		tenant = "-"
	}
	return s.prefix + "/" + kind + "/" + tenant + "/"
}

// keyOf reads what path has written.
func (s *store) keyOf(kind, path string) (k key, ok bool) {
	rest, ok := strings.CutPrefix(path, s.prefix+"/"+kind+"/")
	k.tenant, k.id, _ = strings.Cut(rest, "/")
	if k.tenant == "-" {
		k.tenant = ""
	}
	return k, ok && k.id != ""
}

func unavailable(err error) error { return fmt.Errorf("%w: %w", ErrUnavailable, err) }

// create writes a new job, unless there is one of that name.
func (s *store) create(ctx context.Context, k key, spec []byte, r *record) (created bool, err error) {
	ctx, cancel := s.request(ctx)
	defer cancel()
	value, err := json.Marshal(r)
	if err != nil {
		return false, fmt.Errorf("encode the record: %w", err)
	}
	txn, err := s.client.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(s.path("spec", k)), "=", 0)).
		Then(clientv3.OpPut(s.path("spec", k), string(spec)), clientv3.OpPut(s.path("state", k), string(value))).Commit()
	if err != nil {
		return false, unavailable(err)
	}
	return txn.Succeeded, nil
}

// count is how many jobs there are of a tenant, and in all.
func (s *store) count(ctx context.Context, tenant string) (own, all int64, err error) {
	ctx, cancel := s.request(ctx)
	defer cancel()
	txn, err := s.client.Txn(ctx).Then(
		clientv3.OpGet(s.below("state", tenant), clientv3.WithPrefix(), clientv3.WithCountOnly()),
		clientv3.OpGet(s.prefix+"/state/", clientv3.WithPrefix(), clientv3.WithCountOnly())).Commit()
	if err != nil {
		return 0, 0, unavailable(err)
	}
	return txn.Responses[0].GetResponseRange().GetCount(), txn.Responses[1].GetResponseRange().GetCount(), nil
}

// get reads a job. The error is ErrUnknown for one that there is not.
func (s *store) get(ctx context.Context, k key) (*stored, *pubsub.BroadcastJobSpec, error) {
	ctx, cancel := s.request(ctx)
	defer cancel()
	txn, err := s.client.Txn(ctx).Then(clientv3.OpGet(s.path("state", k)), clientv3.OpGet(s.path("spec", k))).Commit()
	if err != nil {
		return nil, nil, unavailable(err)
	}
	state, specs := txn.Responses[0].GetResponseRange().GetKvs(), txn.Responses[1].GetResponseRange().GetKvs()
	if len(state) == 0 || len(specs) == 0 {
		return nil, nil, ErrUnknown
	}
	r, err := readRecord(state[0].Value, state[0].ModRevision)
	if err != nil {
		return nil, nil, err
	}
	spec := new(pubsub.BroadcastJobSpec)
	if err := proto.Unmarshal(specs[0].Value, spec); err != nil {
		return nil, nil, fmt.Errorf("read the spec of a job: %w", err)
	}
	return r, spec, nil
}

// getRecord reads the record alone.
func (s *store) getRecord(ctx context.Context, k key) (*stored, error) {
	ctx, cancel := s.request(ctx)
	defer cancel()
	got, err := s.client.Get(ctx, s.path("state", k))
	if err != nil {
		return nil, unavailable(err)
	}
	if len(got.Kvs) == 0 {
		return nil, ErrUnknown
	}
	return readRecord(got.Kvs[0].Value, got.Kvs[0].ModRevision)
}

func readRecord(value []byte, rev int64) (*stored, error) {
	r := &stored{rev: rev}
	if err := json.Unmarshal(value, &r.record); err != nil {
		return nil, fmt.Errorf("read the record of a job: %w", err)
	}
	return r, nil
}

// write writes a record in the place of the one of a revision. The error is errConflict if that is not there any more, and
// ErrUnavailable if it may have been written or not.
func (s *store) write(ctx context.Context, k key, r *record, rev int64) (written int64, err error) {
	ctx, cancel := s.request(ctx)
	defer cancel()
	value, err := json.Marshal(r)
	if err != nil {
		return 0, fmt.Errorf("encode the record: %w", err)
	}
	path := s.path("state", k)
	txn, err := s.client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(path), "=", rev)).Then(clientv3.OpPut(path, string(value))).Commit()
	switch {
	case err != nil:
		return 0, unavailable(err)
	case !txn.Succeeded:
		return 0, errConflict
	}
	return txn.Header.Revision, nil
}

// remove forgets a job. The error is errConflict if its record is not that of a revision any more.
func (s *store) remove(ctx context.Context, k key, rev int64) error {
	ctx, cancel := s.request(ctx)
	defer cancel()
	path := s.path("state", k)
	txn, err := s.client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(path), "=", rev)).
		Then(clientv3.OpDelete(path), clientv3.OpDelete(s.path("spec", k))).Commit()
	switch {
	case err != nil:
		return unavailable(err)
	case !txn.Succeeded:
		return errConflict
	}
	return nil
}

// page lists jobs of a tenant behind an id, most of them at most.
func (s *store) page(ctx context.Context, tenant, after string, most int) (ids []string, records []*stored, more bool, err error) {
	ctx, cancel := s.request(ctx)
	defer cancel()
	below := s.below("state", tenant)
	from := below
	if after != "" {
		from = below + after + "\x00"
	}
	got, err := s.client.Get(ctx, from, clientv3.WithRange(clientv3.GetPrefixRangeEnd(below)), clientv3.WithLimit(int64(most)))
	if err != nil {
		return nil, nil, false, unavailable(err)
	}
	for _, kv := range got.Kvs {
		k, ok := s.keyOf("state", string(kv.Key))
		if r, err := readRecord(kv.Value, kv.ModRevision); err == nil && ok {
			ids, records = append(ids, k.id), append(records, r)
		}
	}
	return ids, records, got.More, nil
}

// changed reads all records that were written after a revision; with 0 all there are. now is the revision of etcd.
func (s *store) changed(ctx context.Context, after int64) (records map[key]*stored, now int64, err error) {
	ctx, cancel := s.request(ctx)
	defer cancel()
	options := []clientv3.OpOption{clientv3.WithPrefix()}
	if after > 0 {
		options = append(options, clientv3.WithMinModRev(after+1))
	}
	got, err := s.client.Get(ctx, s.prefix+"/state/", options...)
	if err != nil {
		return nil, 0, unavailable(err)
	}
	records = make(map[key]*stored, len(got.Kvs))
	for _, kv := range got.Kvs {
		k, ok := s.keyOf("state", string(kv.Key))
		if r, err := readRecord(kv.Value, kv.ModRevision); err == nil && ok {
			records[k] = r
		}
	}
	return records, got.Header.Revision, nil
}

// owned are the jobs that somebody runs.
func (s *store) owned(ctx context.Context) (map[key]bool, error) {
	ctx, cancel := s.request(ctx)
	defer cancel()
	got, err := s.client.Get(ctx, s.prefix+"/owner/", clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		return nil, unavailable(err)
	}
	owned := make(map[key]bool, len(got.Kvs))
	for _, kv := range got.Kvs {
		if k, ok := s.keyOf("owner", string(kv.Key)); ok {
			owned[k] = true
		}
	}
	return owned, nil
}

// ownership is a job that is ours, as long as its lease lives.
type ownership struct {
	store *store
	lease clientv3.LeaseID
	end   context.CancelFunc
	over  chan struct{} // closed when the lease has ended, or may have
	wg    sync.WaitGroup
}

// own takes a job that nobody runs. It is nil if somebody else was faster.
func (s *store) own(ctx context.Context, k key, name string, ttl time.Duration) (*ownership, error) {
	asking, cancel := s.request(ctx)
	defer cancel()
	lease, err := s.client.Grant(asking, int64(ttl/time.Second))
	if err != nil {
		return nil, unavailable(err)
	}
	living, end := context.WithCancel(context.WithoutCancel(ctx)) // it ends with release
	o := &ownership{store: s, lease: lease.ID, end: end, over: make(chan struct{})}
	alive, err := s.client.KeepAlive(living, lease.ID)
	if err != nil {
		close(o.over)
		o.release(ctx)
		return nil, unavailable(err)
	}
	o.wg.Go(func() {
		defer close(o.over)
		for range alive { // it is closed when the lease has ended, or may have
		}
	})
	path := s.path("owner", k)
	txn, err := s.client.Txn(asking).If(clientv3.Compare(clientv3.CreateRevision(path), "=", 0)).
		Then(clientv3.OpPut(path, name, clientv3.WithLease(lease.ID))).Commit()
	if err != nil || !txn.Succeeded {
		o.release(ctx)
		if err != nil {
			err = unavailable(err)
		}
		return nil, err
	}
	return o, nil
}

// release lets others have the job: at once, or when the lease has ended if etcd does not answer.
func (o *ownership) release(ctx context.Context) {
	o.end()
	o.wg.Wait()
	ctx, cancel := o.store.request(context.WithoutCancel(ctx))
	defer cancel()
	_, _ = o.store.client.Revoke(ctx, o.lease)
}
